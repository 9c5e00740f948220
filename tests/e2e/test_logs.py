"""What a real server writes to stderr: every line of it, under good requests, bad ones and hostile ones.

pytest tests/e2e/test_logs.py
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.client import ProcessClient
from engine.config import EngineOptions
from engine.errors import ConfigError
from engine.logs import LogOptions
from tests.helpers.fake_engine import ByteTokenizer
from tests.helpers.servers import ROOT, Server, serve, until

SECRETS = ("s3cret-key", "s3cret-prompt", "s3cret-query", "s3cret-agent", "s3cret-wrong")
PROMPT = {"prompt": "Quire is s3cret-prompt", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
CLOSE = b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
HOSTILE_HEADS = [
    b"GET /%0a%0d%7b%22time%22:%22now%22%7d%1b%5b2J%00%7f%c2%9b%ff" + CLOSE + b"te: s3cret-agent\x9b\r\n\r\n",
    b"GET /a%e2%80%a8b?s3cret-query=%0a" + CLOSE + b"x-request-id: a b\x9bc\r\n\r\n",
    b"GET /" + b"x" * 5000 + CLOSE + b"accept: \x9d0;title\r\n\r\n",
    # These are no HTTP, and answered without a line.
    b"EVIL\x1b[31m /" + CLOSE + b"\r\n",
    b"GET /a\x1b[31m" + CLOSE + b"\r\n",
    b"GET /b" + CLOSE + b"x-request-id: a\x0bb\x1b\r\n\r\n",
    b"\x00\xff\n\n{\"level\":\"info\"}\n\n",
    b"POST /v1/completions" + CLOSE + b"content-length: 1\r\ncontent-length: 2\r\n\r\n{}",
]  # fmt: skip


def send_raw(server: Server, head: bytes) -> None:
    """Sends bytes that no client library would, and reads what comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(head)
        try:
            while sock.recv(65536):
                pass
        except ConnectionError:
            pass


def use(server: Server) -> dict[str, str]:
    """A day in the life of a server; returns the ids of some requests."""
    headers = {"authorization": "Bearer s3cret-key"}
    ids = {"whole": "my-whole", "stream": "my-stream"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        http.post("/v1/completions", json=PROMPT, headers={"x-request-id": ids["whole"]})
        http.post("/v1/completions", json={**PROMPT, "stream": True}, headers={"x-request-id": ids["stream"]})
        http.post("/v1/completions", json={**PROMPT, "temperature": "s3cret-prompt\n"})
        http.post("/v1/completions", content=b"{\n")
        http.post("/v1/completions", json=PROMPT, headers={"authorization": "Bearer s3cret-wrong"})
        with http.stream(
            "POST", "/v1/completions", json={**PROMPT, "max_tokens": 1500, "stream": True}
        ) as reply:
            next(reply.iter_lines())
    for head in HOSTILE_HEADS:
        send_raw(server, head)
    return ids


def written(folder: Path, form: str) -> str:
    """All that a server wrote from start to end."""
    with serve(folder, "--log-format", form, "--api-key", "s3cret-key") as server:
        use(server)
        until(lambda: "client_closed_request" in server.log, 10, lambda: server.log)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.log
        return server.log


@pytest.fixture(scope="module")
def json_log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("json"), "json")


@pytest.fixture(scope="module")
def text_log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("text"), "text")


@pytest.fixture(scope="module")
def lines(json_log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in json_log.splitlines()]


@pytest.mark.parametrize("form", ["json_log", "text_log"])
def test_nothing_secret_and_nothing_steering(form: str, request: pytest.FixtureRequest) -> None:
    log: str = request.getfixturevalue(form)
    assert not [secret for secret in SECRETS if secret in log]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", log)
    assert "Traceback" not in log


def test_every_line_is_json(lines: list[dict[str, Any]]) -> None:
    assert len(lines) == 10
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("info", "warning") and line["logger"] and line["message"]
        assert not re.search(
            "[\x00-\x1f\x7f-\x9f\u2028]", json.dumps(line, ensure_ascii=False).replace("\\n", "")
        )
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_the_start_is_an_object_too(lines: list[dict[str, Any]]) -> None:
    (ready,) = [line for line in lines if line["message"].startswith("ready")]
    assert ready["url"].startswith("http://127.0.0.1:") and ready["num_blocks"] > 1
    assert ready["chosen"]["dtype"] and ready["model"] and ready["max_model_len"] == 2048


def test_requests_have_their_ids_and_counts(lines: list[dict[str, Any]]) -> None:
    by_id = {line["request_id"]: line for line in lines if line["logger"] == "quire.access"}
    whole, stream = by_id["my-whole"], by_id["my-stream"]
    assert (whole["stream"], stream["stream"]) == (False, True)
    for line in (whole, stream):
        assert (line["status"], line["completion_tokens"], line["finish_reason"]) == (200, 4, "length")
        assert line["prompt_tokens"] > 1 and line["tenant"] == "key-1" and line["id"].startswith("cmpl-")
        assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["duration_ms"]
        assert line["engine_requests"][0].isdigit()
    errors = [line["error"] for line in by_id.values() if "error" in line]
    assert errors.count("invalid_value") >= 1 and "client_closed_request" in errors
    assert {line["status"] for line in by_id.values()} >= {200, 400, 401}


def test_hostile_paths_are_inside_their_field(lines: list[dict[str, Any]]) -> None:
    paths = [line["path"] for line in lines if line["logger"] == "quire.access"]
    assert any(path.startswith('/\\n\\r{"time":"now"}\\x1b[2J\\x00\\x7f\\x9b') for path in paths), paths
    assert "/a\\u2028b" in paths and all(len(path) < 600 for path in paths)


def test_text_is_one_record_per_line(text_log: str) -> None:
    _, started, rest = text_log.partition("/metrics\n")
    assert started, text_log
    for line in rest.splitlines():
        assert re.match(
            r"\d{4}-\d\d-\d\d [\d:]{8}\.\d{3} (INFO   |WARNING) (access |server |engine ) \S", line
        ), line
    good = (
        r"INFO    access  127\.0\.0\.1 POST /v1/completions 200 TIME \| \d+ prompt tokens \(\d+ cached\), "
        r"4 generated, (queued TIME, )?first after TIME, length \| key-1 \| my-whole cmpl-[0-9a-f]{24}\n"
    )
    assert re.search(good.replace("TIME", r"[\d.]+ m?s"), rest), rest


def test_the_engine_line_comes_under_load_and_once_after(tmp_path: Path) -> None:
    code = (
        "import sys; from server import cli, engine_line; "
        "engine_line.watch.__defaults__ = (0.2,); sys.exit(cli.main(sys.argv[1:]))"
    )
    log = tmp_path / "log"
    with log.open("w") as out:
        command = [sys.executable, "-c", code, "serve", "--port", "0", "--log-format", "json"]
        process = subprocess.Popen(command, cwd=ROOT, stderr=out)
    try:
        until(lambda: "ready to serve" in log.read_text(), 60, log.read_text)
        url = next(json.loads(line)["url"] for line in log.read_text().splitlines() if "ready" in line)
        body = {"prompt": "Quire is", "max_tokens": 1000, "ignore_eos": True}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        until(lambda: "idle now" in log.read_text(), 20, log.read_text)
    finally:
        process.terminate()
        assert process.wait(30) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    engine = [line for line in lines if line["logger"] == "quire.engine"]
    assert engine[0]["running"] == 1 and engine[0]["generated_tokens_per_s"] > 0, engine
    assert [line["message"].startswith("idle now") for line in engine] == [False] * (len(engine) - 1) + [True]
    assert all(
        line["blocks_in_use"] + line["blocks_cached"] + line["blocks_free"] == line["blocks_total"]
        for line in engine
    )


def test_a_start_that_fails_says_so_in_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", str(tmp_path / "none"), "--port", "0"]
    done = subprocess.run(
        [*command, "--log-format", "json"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1 and line["level"] == "critical" and "none" in line["message"]


def test_spans_of_a_real_server(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs quire[otel]: pip install 'quire[otel]'")
    from tests.helpers.collector import attributes, collector

    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with collector() as there, serve(tmp_path, "--otlp-endpoint", there.url) as server:
        headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
        assert server.http.post("/v1/completions", json=PROMPT, headers=headers).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.log
        spans = {span.name: span for span in there.spans}
    assert set(spans) == {"text_completion quire-demo", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {trace_id}
    root = spans["text_completion quire-demo"]
    assert root.parent_span_id.hex() == parent_id
    assert attributes(root)["gen_ai.usage.output_tokens"] == 4
    inside = [spans[name] for name in ("queue", "prefill", "decode")]
    edges = [edge for span in inside for edge in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert [root.start_time_unix_nano, *edges, root.end_time_unix_nano] == sorted(
        [root.start_time_unix_nano, *edges, root.end_time_unix_nano]
    )


@pytest.mark.parametrize("form", ["json", "text"])
def test_the_engine_process_logs_alike(form: str, capfd: pytest.CaptureFixture[str]) -> None:
    options = LogOptions(form=form)
    client = ProcessClient(
        EngineOptions("broken"), ByteTokenizer(), factory="tests.e2e.test_logs:broken", log_options=options
    )
    with pytest.raises(ConfigError):
        asyncio.run(client.start())
    written = capfd.readouterr().err.splitlines()
    if form == "json":
        (line,) = [json.loads(line) for line in written]
        assert (line["level"], line["logger"]) == ("error", "engine.process.child")
        assert line["exception"].endswith("RuntimeError: no\\x1b way")
    else:
        assert written[0].endswith("ERROR   engine  the engine failed") and "\x1b" not in written[-1]
        assert len(written) > 3 and all(line.startswith("    | ") for line in written[1:])


def broken(options: EngineOptions, on_progress: object) -> None:
    raise RuntimeError("no\x1b way")
