"""Lines of the log: how they look, that nobody can forge one, what they say of requests and the engine."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import logs
from engine.logs import JsonFormatter, LogOptions, TextFormatter, plain, source_of
from engine.types import EngineSnapshot, StepRun
from server import log
from server.engine_line import EngineLine, shares
from server.settings import ServerSettings, SettingsError
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, in_process
from tests.helpers.settings import parse_args

pytestmark = pytest.mark.anyio

# Everything that a terminal or a line reader might act upon.
STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
FORGED = "x\n2026-01-01 00:00:00.000 INFO    server  all is well\r\x1b[2J\x9b1m\u2028\u202e"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def record(message: str, *args: object, level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    name = more.pop("name", "quire")
    made = logging.LogRecord(name, level, __file__, 1, message, args, more.pop("exc_info", None))
    for key, value in more.items():
        setattr(made, key, value)
    return made


def boom(message: str) -> logging.LogRecord:
    try:
        raise ValueError(message)
    except ValueError:
        return record("it broke", level=logging.ERROR, exc_info=sys.exc_info())


# How a line looks.


def test_text_is_in_columns() -> None:
    formatter = TextFormatter(LogOptions())
    lines = [
        formatter.format(record("ready")),
        formatter.format(record("careful", level=logging.WARNING, name="engine.process.loop")),
        formatter.format(record("GET / 200", name="quire.access")),
    ]
    assert [line[24:] for line in lines] == [
        "INFO    server  ready",
        "WARNING engine  careful",
        "INFO    access  GET / 200",
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ", line) for line in lines)


def test_a_terminal_shows_the_time_of_day_and_colours() -> None:
    line = TextFormatter(LogOptions(terminal=True, colour=True)).format(record("no", level=logging.ERROR))
    assert re.match(r"\x1b\[2m\d\d:\d\d:\d\d\.\d{3}\x1b\[0m \x1b\[31mERROR  \x1b\[0m ", line)
    assert "\x1b" not in TextFormatter(LogOptions(terminal=True)).format(record("no", level=logging.ERROR))


def test_a_traceback_is_indented() -> None:
    first, *rest = TextFormatter(LogOptions()).format(boom("no")).split("\n")
    assert first.endswith("it broke") and len(rest) > 3
    assert all(line.startswith("    | ") for line in rest) and rest[-1] == "    | ValueError: no"


def test_sources() -> None:
    names = ("quire", "quire.access", "quire.engine", "engine.client.supervised", "uvicorn.error")
    assert [source_of(name) for name in names] == ["server", "access", "engine", "engine", "uvicorn"]


def test_json_has_what_programs_want() -> None:
    fields = {"status": 200, "share": 1 / 3, "none": None, "bad": float("nan"), "tags": ("a", "b")}
    line = json.loads(JsonFormatter().format(record("done in %d ms", 5, fields=fields, name="quire.access")))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "quire.access",
        "message": "done in 5 ms",
        "status": 200,
        "share": 0.333333,
        "none": None,
        "bad": None,
        "tags": ["a", "b"],
    }


def test_fields_cannot_replace_what_is_ours() -> None:
    forged = {
        "time": "never",
        "level": "debug",
        "message": "nothing",
        "logger": "x",
        "exception": "y",
        "a": 1,
    }
    line = json.loads(JsonFormatter().format(record("true", fields=forged)))
    assert (line["message"], line["level"], line["logger"], line["a"]) == ("true", "info", "quire", 1)
    assert line["time"] != "never" and "exception" not in line


def test_an_exception_is_one_field() -> None:
    line = json.loads(JsonFormatter().format(boom("no")))
    assert line["message"] == "it broke" and line["level"] == "error"
    assert line["exception"].startswith("Traceback") and line["exception"].endswith("ValueError: no")


# What clients send stays where it is put.


@given(st.text(st.characters(), max_size=80) | st.just(FORGED))
def test_nothing_breaks_a_line(text: str) -> None:
    shown = TextFormatter(LogOptions()).format(record("sent: %s", text))
    assert not STEERING.search(shown)
    shown.encode()
    written = JsonFormatter().format(record("sent: %s", text, fields={"path": text, "all": {text: [text]}}))
    assert written.isascii() and not STEERING.search(written)
    read = json.loads(written)
    assert set(read) == {"time", "level", "logger", "message", "path", "all"}
    for value in (read["message"], read["path"], *read["all"]):
        assert not STEERING.search(value), "also once it is decoded: people print fields"


@given(st.text(max_size=80) | st.just(FORGED))
def test_nothing_breaks_a_traceback(text: str) -> None:
    _, *trace = TextFormatter(LogOptions()).format(boom(text)).split("\n")
    assert all(line.startswith("    | ") for line in trace)
    assert not STEERING.search("".join(trace))
    written = JsonFormatter().format(boom(text))
    assert not STEERING.search(written)
    assert not STEERING.search(json.loads(written)["exception"].replace("\n", ""))


def test_harmless_text_is_left_alone() -> None:
    assert plain("Größe: 5 µs, 日本語, 👍🏽") == "Größe: 5 µs, 日本語, 👍🏽"
    assert plain("a\tb\\n") == "a\\tb\\n"


def test_a_message_is_bounded() -> None:
    line = TextFormatter(LogOptions()).format(record("%s", "x" * 100_000))
    assert len(line) < 20_000 and line.endswith("(100000 characters)")


# Which records get there.


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[LogOptions], io.StringIO]]:
    """Configures logging on a stream, and puts everything back."""
    root = logging.getLogger()
    kept = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in ("quire", "engine")}
    monkeypatch.setattr(logs, "_catch_the_rest", lambda: None)

    def configure(options: LogOptions) -> io.StringIO:
        stream = io.StringIO()
        log.configure_logging(options, stream)
        return stream

    yield configure
    root.handlers[:] = kept[0]
    root.setLevel(kept[1])
    for name, level in kept[2].items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)


def test_ours_from_the_level_on_and_others_warnings(
    written: Callable[[LogOptions], io.StringIO],
) -> None:
    written(LogOptions())
    stream = written(LogOptions(level="info", form="json"))  # the second call replaces the first
    logging.getLogger("engine.core").info("one")
    logging.getLogger("quire").debug("too much")
    logging.getLogger("elsewhere").info("too much")
    logging.getLogger("elsewhere").warning("two")
    logging.getLogger("uvicorn.error").warning("a client's doing")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["logger"], line["message"]) for line in lines] == [
        ("engine.core", "one"),
        ("elsewhere", "two"),
    ]


def test_lines_of_a_request_have_its_id(written: Callable[[LogOptions], io.StringIO]) -> None:
    stream = written(LogOptions(form="json"))
    token = log.request_id.set("req-1")
    logging.getLogger("quire").info("in")
    logging.getLogger("quire").info("own", extra={"fields": {"request_id": "req-2"}})
    log.request_id.reset(token)
    logging.getLogger("quire").info("out")
    assert [json.loads(line).get("request_id") for line in stream.getvalue().splitlines()] == [
        "req-1",
        "req-2",
        None,
    ]


def test_what_python_itself_says_is_json_too() -> None:
    code = """
import threading, warnings
from engine import logs
logs.configure(logs.LogOptions(form="json"))
warnings.warn("old\\nthing", stacklevel=1)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
class Broken:
    def __del__(self): raise KeyError("gone")
Broken()
raise RuntimeError("the end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1 and done.stdout == ""
    assert [line["level"] for line in lines] == ["warning", "critical", "critical", "critical"]
    assert "old\\nthing" in lines[0]["message"]
    ends = [line["exception"].splitlines()[-1] for line in lines[1:]]
    assert ends == ["ZeroDivisionError: division by zero", "KeyError: 'gone'", "RuntimeError: the end"]


# Settings.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "stream", "colour"),
    [
        ({}, Terminal(), True),
        ({"NO_COLOR": "1"}, Terminal(), False),
        ({"NO_COLOR": ""}, Terminal(), True),  # as no-color.org has it
        ({"TERM": "dumb"}, Terminal(), False),
        ({}, io.StringIO(), False),
    ],
)
def test_colour_only_where_it_is_wanted(environ: dict[str, str], stream: io.StringIO, colour: bool) -> None:
    options = log.log_options(parse_args([], environ), stream)
    assert options == LogOptions("info", "text", isinstance(stream, Terminal), colour)


def test_the_format_is_a_setting() -> None:
    assert parse_args(["--log-format", "json"], {}).log_format == "json"
    assert parse_args([], {"QUIRE_LOG_FORMAT": "json", "QUIRE_LOG_PROMPTS": "1"}).log_prompts
    with pytest.raises(SettingsError, match="--log-format 'xml'"):
        parse_args(["--log-format", "xml"], {})


# What is said of requests.


class Lines:
    """The records of our access log."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        caplog.set_level(logging.INFO, logger="quire")

    def records(self, name: str = "quire.access") -> list[logging.LogRecord]:
        return [record for record in self._caplog.records if record.name == name]

    def fields(self) -> list[dict[str, Any]]:
        return [record.__dict__["fields"] for record in self.records()]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    return Lines(caplog)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_in_one_line(lines: Lines, stream: bool) -> None:
    async with in_process() as (http, _):
        body = {"messages": HELLO, "stream": stream, "max_tokens": 5}
        reply = await http.post(CHAT, json=body, headers={"x-request-id": "mine-1"})
    (line,), (fields,) = lines.records(), lines.fields()
    assert reply.headers["x-request-id"] == fields["request_id"] == "mine-1"
    for name in ("duration_ms", "ttft_ms"):
        assert fields[name] >= 0
    assert fields["id"] in reply.text and fields["id"] in line.getMessage()
    expected = {
        "method": "POST", "path": CHAT, "status": 200, "api": "chat", "stream": stream,
        "prompts": 1, "choices": 1, "prompt_tokens": 8, "cached_tokens": 0, "completion_tokens": 5,
        "finish_reason": "length",
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected and "priority" not in fields
    text = re.sub(r"[\d.]+ m?s", "T", line.getMessage())
    assert text == (
        f"127.0.0.1 POST {CHAT} 200 T | 8 prompt tokens (0 cached), 5 generated, first after T, length | "
        f"mine-1 {fields['id']}"
    )


async def test_several_prompts_and_choices(lines: Lines) -> None:
    async with in_process() as (http, _):
        await http.post(COMPLETIONS, json={"prompt": ["ab", "abc"], "n": 2, "max_tokens": 3, "priority": 7})
    (fields,) = lines.fields()
    assert fields["priority"] == 7
    assert (fields["prompts"], fields["choices"], fields["prompt_tokens"], fields["completion_tokens"]) == (
        2,
        4,
        5,
        12,
    )
    assert fields["finish_reason"] == "length"


async def test_refusals_say_why(lines: Lines) -> None:
    engine = FakeClient()
    engine.max_in_flight = 0
    async with in_process(engine) as (http, _):
        await http.post(CHAT, json={"messages": HELLO})
        await http.post(CHAT, json={"messages": []})
        await http.post(CHAT, json={"messages": HELLO, "model": "other\n2026"})
    found = [(fields["status"], fields["error"]) for fields in lines.fields()]
    assert found == [(429, "queue_full"), (400, "invalid_value"), (404, "model_not_found")]
    assert all("completion_tokens" not in fields and "id" not in fields for fields in lines.fields())
    assert all(record.levelname == "INFO" for record in lines.records())


@pytest.mark.parametrize("stream", [False, True])
async def test_our_own_failures_are_warnings(lines: Lines, stream: bool) -> None:
    engine = FakeClient()
    engine.die_after = 2
    async with in_process(engine) as (http, _):
        await http.post(CHAT, json={"messages": HELLO, "stream": stream})
    (line,), (fields,) = lines.records(), lines.fields()
    assert line.levelname == "WARNING" and fields["error"] == "engine_unavailable"
    assert fields["status"] == (200 if stream else 503) and fields["completion_tokens"] == 2


async def test_a_request_that_breaks_is_named_by_its_id(
    lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeClient()
    engine.fail_after = 1
    async with in_process(engine) as (http, _):
        await http.post(CHAT, json={"messages": HELLO, "stream": True})
    (fields,) = lines.fields()
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert error.getMessage() == f"request {fields['id']} failed in the engine: boom"
    assert fields["error"] == "request_failed"


async def test_no_line_where_none_is_wanted(lines: Lines) -> None:
    async with in_process(settings=ServerSettings(access_log=False)) as (http, _):
        await http.post(CHAT, json={"messages": HELLO})
    async with in_process() as (http, _):
        for path in ("/health", "/ready", "/metrics"):
            await http.get(path)
    assert lines.records() == []


HOSTILE = (
    '/x%0a2026-01-01 00:00:00.000 INFO    access  1.2.3.4 GET / 200 1 ms | req-1%1b[2J"%c2%9b%e2%80%a8%7f'
)


async def test_a_path_cannot_forge_a_line(lines: Lines) -> None:
    async with in_process() as (http, _):
        await http.get(
            HOSTILE + "?key=secret", headers={"x-request-id": 'a" 200 \t', "user-agent": "\x1b[31m"}
        )
    (found,) = lines.records()
    shown = TextFormatter(LogOptions()).format(found)
    assert not STEERING.search(shown)
    # All of it is inside one pair of quotes; the real status follows.
    quoted = re.search(r'GET ("(?:[^"\\]|\\.)*") 404 [\d.]+ m?s \| (req-[0-9a-f]{16})$', shown)
    assert quoted, shown
    written = json.loads(JsonFormatter().format(found))
    assert (
        written["status"] == 404 and written["path"].startswith("/x\\n2026") and "secret" not in str(written)
    )


async def test_prompts_and_keys_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = FakeClient(lambda ids, params, index: "s3cret-answer")
    body = {
        "messages": [{"role": "user", "content": "s3cret-prompt"}],
        "stop": ["s3cret-stop"],
        "user": "s3cret-user",
    }
    async with in_process(engine, ServerSettings(api_keys=("s3cret-key",))) as (http, _):
        for key in ("s3cret-key", "s3cret-wrong"):
            await http.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})
        engine.fail_after = 0
        await http.post(CHAT, json=body, headers={"authorization": "Bearer s3cret-key"})
    ours = [record for record in caplog.records if record.name.split(".")[0] in ("quire", "engine")]
    assert len(ours) == 4
    assert all("s3cret" not in JsonFormatter().format(record) for record in ours)


async def test_prompts_are_logged_where_the_operator_says_so(
    caplog: pytest.LogCaptureFixture, lines: Lines
) -> None:
    async with in_process(settings=ServerSettings(log_prompts=True)) as (http, _):
        await http.post(COMPLETIONS, json={"prompt": ["a\nb", "c" * 1500], "max_tokens": 1})
    short, long = lines.records("quire.prompt")
    (fields,) = lines.fields()
    assert short.getMessage() == f'{fields["id"]} prompt 0: "a\\nb"'
    assert (
        long.__dict__["fields"]["cut"]
        and len(long.getMessage()) < 1100
        and long.getMessage().endswith('" ...')
    )


def test_prompts_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    log.warn_of_prompts()
    assert caplog.records[-1].levelname == "WARNING" and "--log-prompts" in caplog.text


# The engine line.

START = EngineSnapshot(blocks_total=100, blocks_free=100)
BUSY = EngineSnapshot(
    steps=50, running=3, waiting=1, blocks_total=100, blocks_in_use=12, blocks_cached=30, blocks_free=58,
    prefix_query_tokens=400, prefix_hit_tokens=256, prompt_tokens=4120, generated_tokens=1183,
)  # fmt: skip


def test_the_engine_line() -> None:
    line = EngineLine()
    assert line.next(START, 10) is None
    text, fields = line.next(BUSY, 10.0) or ("", {})
    assert text == (
        "3 running, 1 waiting | 412 prompt + 118 generated tokens/s | "
        "pool 12% in use, 30% cached, 58% free | 64% of prompt tokens cached"
    )
    assert fields == {
        "interval_s": 10.0, "running": 3, "waiting": 1, "prompt_tokens_per_s": 412.0,
        "generated_tokens_per_s": 118.3, "blocks_in_use": 12, "blocks_cached": 30, "blocks_free": 58,
        "blocks_total": 100, "hit_ratio": 0.64, "preemptions": 0, "graph_ratio": None,
    }  # fmt: skip


def test_the_engine_line_tells_of_graphs() -> None:
    line = EngineLine()
    runs = {StepRun.GRAPH: 30, StepRun.GRAMMAR: 8, StepRun.PROMPT: 2, StepRun.UNCAPTURED: 10}
    text, fields = line.next(replace(BUSY, step_runs=runs), 10) or ("", {})
    assert "76% of steps as graphs" in text and fields["graph_ratio"] == 0.76
    runs = {**runs, StepRun.GRAPH: 40}
    text, fields = line.next(replace(BUSY, steps=60, step_runs=runs), 10) or ("", {})
    assert "100% of steps as graphs" in text and fields["graph_ratio"] == 1.0


def test_the_engine_line_says_once_that_it_is_idle() -> None:
    line = EngineLine()
    line.next(BUSY, 10)
    idle = EngineSnapshot(steps=60, blocks_total=100, blocks_cached=42, blocks_free=58, generated_tokens=1200)
    text, fields = line.next(idle, 10) or ("", {})
    assert text.startswith("idle now | 0 prompt") and fields["running"] == 0
    assert fields["hit_ratio"] is None and "of prompt tokens" not in text
    assert line.next(idle, 10) is None


def test_the_engine_line_goes_on_while_a_step_hangs() -> None:
    line = EngineLine()
    line.next(BUSY, 10)
    text, fields = line.next(BUSY, 10) or ("", {})
    assert text.startswith("3 running, 1 waiting | 0 prompt + 0 generated")
    assert fields["generated_tokens_per_s"] == 0


def test_the_engine_line_survives_a_new_engine() -> None:
    line = EngineLine()
    line.next(BUSY, 10)
    new = EngineSnapshot(
        steps=5, running=1, blocks_total=100, blocks_free=100, generated_tokens=20, preemptions=2
    )
    text, fields = line.next(new, 10) or ("", {})
    assert fields["generated_tokens_per_s"] == 2.0 and fields["preemptions"] == 2 and "2 preempted" in text
    assert line.next(EngineSnapshot(), 10) is None  # dead again, nothing known yet


def test_shares() -> None:
    assert shares(0, 1, 999) == ["0%", "<1%", "100%"]
    assert shares(0, 0, 0) == ["0%", "0%", "0%"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0013, "1.3 ms"), (0.381, "381 ms"), (12.34, "12.3 s"), (1.402, "1.40 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert log.duration(seconds) == text
