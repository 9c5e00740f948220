"""`quire chat` against a served fake, a scripted server, and a terminal of its own (a pty)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from server import cli, settings
from server.terminal.client import Answer, parse_url
from server.terminal.screen import Cleaner, Screen, cleaned
from server.terminal.session import summary


class Scripted(ThreadingHTTPServer):
    """An API that answers with the given chunks, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.models: Any = {"data": [{"id": "first"}, {"id": "second"}]}
        self.chunks: Sequence[Any] = [delta(content="Hi."), "[DONE]"]
        self.refusal: tuple[int, Any] | None = None
        self.asked: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, "application/json", json.dumps(self.server.models).encode())

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.server.heads.append({name.lower(): value for name, value in self.headers.items()})
        if self.server.refusal:
            status, body = self.server.refusal
            self._reply(status, "application/json", json.dumps(body).encode())
            return
        events = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in self.server.chunks]
        self._reply(200, "text/event-stream", "".join(f"data: {event}\n\n" for event in events).encode())

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def fake(*flags: str) -> Iterator[str]:
    """The address of Quire's server around a fake engine, in a process of its own."""
    command = [sys.executable, "-m", "tests.helpers.serve_fake", "--port", "0", *flags]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert started.stdout is not None
    try:
        word, port = started.stdout.readline().split()
        assert word == "ready"
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


# A session and terminal of its own, so that Ctrl-C is a signal. Not pty.fork: it forks beside our threads.
ON_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from server.cli import main
sys.exit(main(["chat", *sys.argv[1:]]))
"""


class Terminal:
    """`quire chat` on a pty."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.seen = ""
        self._fd, other = pty.openpty()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_") and k != "NO_COLOR"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**kept, "TERM": "xterm", **variables},
            start_new_session=True,
        )
        os.close(other)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, pattern: str, timeout_s: float = 120) -> str:
        """Waits for it, and takes everything up to its end."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            if time.monotonic() > deadline:
                pytest.fail(f"no {pattern!r} in {self.seen[-2000:]!r}")
            self._read()
        taken, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return taken

    def exit_code(self) -> int:
        return self._process.wait(120)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def _read(self) -> None:
        if select.select([self._fd], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                self.seen += os.read(self._fd, 65536).decode("utf-8", "replace")


@contextlib.contextmanager
def terminal(*arguments: str, **variables: str) -> Iterator[Terminal]:
    running = Terminal(*arguments, **variables)
    try:
        yield running
    finally:
        running.close()


def ask(url: str, *arguments: str) -> int:
    return cli.main(["chat", "--url", url, *arguments])


def test_one_question_prints_only_the_answer(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    scripted.chunks = [
        delta(reasoning_content="Hm."),
        delta(content="For"),
        delta(content="ty"),
        usage,
        "[DONE]",
    ]
    flags = ["--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "9", "--api-key", "k"]
    assert ask(scripted.url, *flags, "How", "many?") == 0
    assert capsys.readouterr() == ("Forty\n", "")
    (asked,), (head,) = scripted.asked, scripted.heads
    assert asked["model"] == "first" and (asked["temperature"], asked["max_tokens"]) == (0.5, 9)
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
    ]
    assert head["authorization"] == "Bearer k"
    # In a header, for servers that refuse fields they do not know.
    assert head["x-quire-explain-cache"] == "true" and "explain_cache" not in asked


def test_a_question_from_a_pipe(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("line one\nline two\n"))
    assert ask(scripted.url, "--model", "other") == 0
    assert scripted.asked[0]["messages"][-1]["content"] == "line one\nline two\n"
    assert scripted.asked[0]["model"] == "other"


def test_what_is_not_said_is_not_sent(scripted: Scripted) -> None:
    assert ask(scripted.url, "hi") == 0
    assert set(scripted.asked[0]) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize(
    ("refusal", "flags", "words"),
    [
        (
            (401, {"error": {"message": "who?"}}),
            [],
            "asks for an API key: give one with --api-key or QUIRE_API",
        ),
        ((401, {"error": {"message": "who?"}}), ["--api-key", "x"], "does not take this API key"),
        ((400, {"error": {"message": "too\nlong\x1b[2J", "code": "c"}}), [], "HTTP 400 from URL: too long\n"),
        ((500, "oops"), [], "HTTP 500 from URL: oops\n"),
    ],
)
def test_a_refusal_is_one_line(
    scripted: Scripted, capsys: pytest.CaptureFixture[str], refusal: Any, flags: list[str], words: str
) -> None:
    scripted.refusal = refusal
    assert ask(scripted.url, *flags, "hi") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("quire: error: ") and err.count("\n") == 1
    assert words in err.replace(scripted.url, "URL")


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([delta(content="Be")], "ended the stream early"),
        ([delta(content="Be"), {"error": {"message": "the engine died"}}, "[DONE]"], "the engine died"),
        ([delta(content="Be"), "<html>"], "something other than an answer"),
    ],
)
def test_a_broken_answer_is_an_error(
    scripted: Scripted, capsys: pytest.CaptureFixture[str], chunks: list[Any], words: str
) -> None:
    scripted.chunks = chunks
    assert ask(scripted.url, "hi") == 1
    out, err = capsys.readouterr()
    assert out == "Be\n" and words in err and err.count("\n") == 1


def test_no_server_no_model_no_question(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("http://127.0.0.1:9", "hi") == 1
    assert "no server at http://127.0.0.1:9/v1; `quire serve` starts one" in capsys.readouterr().err
    for nothing in ("", " "):
        assert ask(scripted.url, nothing) == 1
        assert "no question" in capsys.readouterr().err
    scripted.models = {"data": []}
    assert ask(scripted.url, "hi") == 1
    assert "lists no model" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--url=nowhere", "--max-tokens=0", "--temperature=nan", "--api-key=\n"])
def test_bad_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["chat", flag, "hi"])
    except SystemExit as exit:
        code = int(exit.code or 0)
    assert code in (1, 2) and "Traceback" not in capsys.readouterr().err


def test_addresses() -> None:
    assert (
        parse_url("http://h:1") == parse_url("http://h:1/") == parse_url("http://h:1/v1/") == "http://h:1/v1"
    )
    assert parse_url("https://h/api/openai/v1") == "https://h/api/openai/v1"
    for wrong in (
        "h:8000",
        "ftp://h",
        "http://",
        "http://h:99999",
        "http://h/v1?x",
        "http://h/a b",
        "http://h:x",
    ):
        with pytest.raises(ValueError):
            parse_url(wrong)


def test_the_key_and_colour_come_from_the_environment() -> None:
    found = settings.terminal_variables({"QUIRE_API_KEY": "one, two", "NO_COLOR": "1"})
    assert (found.api_key, found.colour) == ("one", False)
    assert settings.terminal_variables({}) == settings.TerminalVariables(None, True)
    assert "one" not in repr(found)


ESCAPES = [
    ("a\x1b[31mred\x1b[0m", "ared"),
    ("a\x1b]0;title\x07b\x1b]52;c;aGk=\x1b\\c", "abc"),
    ("a\x9b2Jb\x9d0;t\x9cc\x90q\x9cd", "abcd"),
    ("a\x1b(Bb\x1bcc\x07\x08\x7f\rd", "abcd"),
    ("tab\tline\nwörld 🙂 \x1b]never ends\nb", "tab\tline\nwörld 🙂 \nb"),
    ("\ud800x", "x"),
]


@pytest.mark.parametrize(("text", "clean"), ESCAPES)
def test_escapes_are_taken_out_however_they_are_cut(text: str, clean: str) -> None:
    assert cleaned(text) == clean
    pieces = Cleaner()
    assert "".join(pieces.feed(character) for character in text) == clean


def test_an_answer_with_escapes(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.chunks = [delta(content="a\x1b]0;own"), delta(content="ed\x07b\r\n"), "[DONE]"]
    assert ask(scripted.url, "hi") == 0
    assert capsys.readouterr().out == "ab\n"


def test_a_screen_that_cannot_write_everything() -> None:
    raw = io.BytesIO()
    screen = Screen(io.TextIOWrapper(raw, encoding="ascii"), colour=True)
    screen.write("ö")
    screen.write("x", dim=True)
    screen.end_line()
    assert raw.getvalue() == b"?\x1b[2mx\n\x1b[0m"


def test_the_summary_says_what_is_known() -> None:
    assert summary(Answer(text="x")) == ""
    whole = Answer("x", 12, 8, 11, first_s=0.5, last_s=2.5, finish_reason="length")
    assert summary(whole) == (
        "12 prompt tokens (8 cached, 4 computed), 11 generated, first token after 0.50 s, 5.0 tokens/s, "
        "cut at the token limit"
    )


def test_a_conversation_on_a_terminal() -> None:
    with fake("--tokens", "30") as url, terminal("--url", url) as tty:
        tty.until("quire-demo at http.*> ")
        tty.type("hello there, fake\n")
        shown = tty.until("> ")
        assert "abcdefghi abcdefghi abcdefghi \r\n\x1b[2m" in shown
        assert re.search(r"\d+ prompt tokens \(\d+ cached, \d+ computed\), 3\d generated, first token", shown)
        assert "prompt tokens are in the cache" in shown or "cache" in shown.split("tokens/s")[1]
        tty.type("/nonsense\n")
        tty.until("there is no /nonsense.*> ")
        tty.type("/help\n")
        tty.until("/reset .*Ctrl-C stops an answer.*> ")
        tty.type("not to be sent")
        tty.until("not to be sent")
        time.sleep(0.3)  # Python's readline misses a signal in the instant before it waits for a key
        tty.type("\x03")
        assert "abcdefghi" not in tty.until("/quit leaves.*> ")
        tty.type("\x04")
        assert tty.exit_code() == 0


def test_history_system_and_reset(scripted: Scripted) -> None:
    with terminal("--url", scripted.url, NO_COLOR="1") as tty:
        opening = tty.until("first at .*> ")
        for line in ("one", "two", "/system Rhyme.", "three", "/reset", "/system", "four"):
            tty.type(line + "\n")
            opening += tty.until(r"\n[^\n]*\n(?:\S*)> ")
        tty.type("/quit\n")
        assert tty.exit_code() == 0
    contents = [[message["content"] for message in asked["messages"]] for asked in scripted.asked]
    assert contents == [
        ["one"],
        ["one", "Hi.", "two"],
        ["Rhyme.", "one", "Hi.", "two", "Hi.", "three"],
        ["four"],
    ]
    assert "\x1b[2m" not in opening


def test_reasoning_is_dim_and_not_sent_back(scripted: Scripted) -> None:
    scripted.chunks = [delta(reasoning="Let me see."), delta(content="Yes."), "[DONE]"]
    with terminal("--url", scripted.url) as tty:
        tty.until("> ")
        tty.type("well?\n")
        shown = tty.until("Yes.*> ")
        assert "\x1b[2mLet me see.\r\n\x1b[0m\r\nYes." in shown
        tty.type("sure?\n")
        tty.until("Yes.*> ")
        tty.type("/quit\n")
        assert tty.exit_code() == 0
    assert scripted.asked[1]["messages"][1] == {"role": "assistant", "content": "Yes."}


PASTED = "def f():\n    return 1\n/quit"


@pytest.mark.parametrize("text", [f"\x1b[200~{PASTED}\x1b[201~\n", PASTED + "\n"], ids=["bracketed", "plain"])
def test_pasted_lines_are_one_message(scripted: Scripted, text: str) -> None:
    with terminal("--url", scripted.url) as tty:
        tty.until("> ")
        tty.type(text)
        tty.until("Hi.*> ")
        tty.type("a \\\n")
        tty.until(r"\. ")
        tty.type("b\n")
        tty.until("Hi.*> ")
        tty.type("\x04")
        assert tty.exit_code() == 0
    asked = [request["messages"][-1]["content"] for request in scripted.asked]
    assert asked == [PASTED, "a \nb"]


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    with fake("--tokens", "1000", "--pause", "0.02") as url, terminal("--url", url) as tty:
        tty.until("> ")
        tty.type("go on\n")
        tty.until("abcdefghi ")
        tty.type("\x03")
        shown = tty.until("stopped.*> ")
        assert "1000 generated" not in shown
        tty.type("/quit\n")
        assert tty.exit_code() == 0


def test_an_error_leaves_the_conversation_as_it_was(scripted: Scripted) -> None:
    with terminal("--url", scripted.url) as tty:
        tty.until("> ")
        scripted.refusal = (503, {"error": {"message": "busy"}})
        tty.type("one\n")
        tty.until("HTTP 503 from .*: busy.*> ")
        scripted.refusal = None
        tty.type("two\n")
        tty.until("Hi.*> ")
        tty.type("/quit\n")
        assert tty.exit_code() == 0
    assert [message["content"] for message in scripted.asked[1]["messages"]] == ["two"]


def test_a_terminal_without_a_server() -> None:
    with terminal("--url", "http://127.0.0.1:9/v1") as tty:
        tty.until("quire: error: no server at http://127.0.0.1:9/v1; `quire serve` starts one")
        assert tty.exit_code() == 1
