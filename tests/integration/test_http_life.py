"""A server's life as a process: start, failed start, drain, the second signal."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from engine.errors import ConfigError
from server.app import create_app
from server.port import PortTaken, listen
from server.run import Server
from server.settings import ServerSettings
from tests.helpers.fake_client import BrokenClient, FakeClient, FakeTemplate, FakeTokenizer
from tests.helpers.http import CHAT, HELLO, chat_text, frames, in_process


@dataclass
class Process:
    process: subprocess.Popen[str]
    port: int

    def stream(self, into: list[str]) -> threading.Thread:
        """A stream that has begun, and a thread that puts its text `into` a list once it has ended."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        body = json.dumps({"messages": HELLO, "stream": True, "max_tokens": 2000})
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()

        def read() -> None:
            with contextlib.closing(connection):
                into.append(reply.read().decode())

        thread = threading.Thread(target=read)
        thread.start()
        return thread

    def get(self, path: str) -> tuple[int, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", path)
            reply = connection.getresponse()
            reply.read()
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}

    def until_draining(self) -> None:
        while self.get("/ready")[0] != 503:
            time.sleep(0.01)

    def exit_code(self) -> int:
        return self.process.wait(20)


@contextlib.contextmanager
def process(*flags: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "tests.helpers.serve_fake", "--port", "0", *flags]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        word, port = started.stdout.readline().split()
        assert word == "ready"
        yield Process(started, int(port))
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


def test_a_signal_lets_streams_finish() -> None:
    with process("--tokens", "600", "--pause", "0.001") as server:
        texts: list[str] = []
        readers = [server.stream(texts) for _ in range(8)]
        server.process.send_signal(signal.SIGTERM)
        server.until_draining()
        status, headers = server.get("/v1/models")
        assert (status, headers["connection"]) == (503, "close") and int(headers["retry-after"]) > 0
        assert server.get("/health")[0] == 200
        for reader in readers:
            reader.join()
        assert server.exit_code() == 0
    for text in texts:
        assert len(chat_text(frames(text))) == 600


def test_past_the_timeout_streams_end_with_an_error() -> None:
    with process("--tokens", "2000", "--pause", "0.01", "--shutdown-timeout", "0.2") as server:
        texts: list[str] = []
        reader = server.stream(texts)
        server.process.send_signal(signal.SIGTERM)
        started_s = time.monotonic()
        reader.join()
        assert server.exit_code() == 0
        assert time.monotonic() - started_s < 2.5
    assert frames(texts[0])[-1]["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number: signal.Signals) -> None:
    with process("--tokens", "2000", "--pause", "0.01") as server:
        texts: list[str] = []
        reader = server.stream(texts)
        server.process.send_signal(signal.SIGTERM)
        server.until_draining()
        started_s = time.monotonic()
        server.process.send_signal(number)
        reader.join()
        assert server.exit_code() == 128 + number
        assert time.monotonic() - started_s < 2
    assert frames(texts[0])[-1]["error"]["code"] == "shutting_down"


def test_an_idle_server_ends_at_once() -> None:
    with process() as server:
        connection = socket.create_connection(("127.0.0.1", server.port))
        started_s = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.exit_code() == 0
        assert time.monotonic() - started_s < 2
        connection.close()


def test_a_taken_port_is_one_line() -> None:
    with listen("127.0.0.1", 0) as sock, pytest.raises(PortTaken, match=r"port \d+: address already in use"):
        sock.listen()
        listen("127.0.0.1", sock.getsockname()[1])


def test_an_engine_that_cannot_start_is_the_servers_end() -> None:
    async def run() -> None:
        app = create_app(BrokenClient(), ServerSettings(), FakeTokenizer(), FakeTemplate())
        with listen("127.0.0.1", 0) as sock:
            await Server(app, ServerSettings()).run_until_stopped(
                sock, lambda: pytest.fail("it is not ready")
            )

    with pytest.raises(ConfigError, match="14 GiB"):
        asyncio.run(run())


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
class TestPhases:
    async def test_starting(self) -> None:
        client = FakeClient()
        client.start_gate.clear()
        async with in_process(client, wait=False) as (http, _):
            ready = await http.get("/ready")
            assert ready.status_code == 503 and ready.json()["error"]["code"] == "loading"
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/metrics")).status_code == 200
            assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None
            early = await http.post(CHAT, json={"messages": HELLO})
            assert early.status_code == 503 and early.headers["retry-after"]
            client.start_gate.set()
            while (await http.get("/ready")).status_code != 200:
                await asyncio.sleep(0)
            assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 200

    async def test_failed(self) -> None:
        async with in_process(BrokenClient()) as (http, _):
            for path in ("/health", "/ready"):
                reply = await http.get(path)
                assert reply.status_code == 503 and "GiB" not in reply.text
            assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 503

    async def test_a_sick_engine(self) -> None:
        async with in_process() as (http, client):
            client.sickness = "no progress for 30 s"
            for path in ("/health", "/ready"):
                assert (await http.get(path)).status_code == 503
            refused = await http.post(CHAT, json={"messages": HELLO})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_unavailable"
            client.sickness = None
            assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 200

    @pytest.mark.parametrize("stream", [True, False])
    async def test_the_engine_dies_under_a_request(self, stream: bool) -> None:
        async with in_process() as (http, client):
            client.die_after = 5
            reply = await http.post(CHAT, json={"messages": HELLO, "stream": stream})
            if stream:
                assert frames(reply.text)[-1]["error"]["code"] == "engine_unavailable"
            else:
                assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_unavailable"
            assert client.in_flight == 0

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("body", [{"n": 3}, {"prompt": ["a", "b", "c"]}])
    async def test_one_choice_breaks(self, stream: bool, body: dict[str, object]) -> None:
        async with in_process() as (http, client):
            client.fail_after = 5
            path = "/v1/completions" if "prompt" in body else CHAT
            reply = await http.post(path, json={"messages": HELLO, **body, "stream": stream})
            error = frames(reply.text)[-1]["error"] if stream else reply.json()["error"]
            assert error["code"] == "request_failed" and "boom" not in reply.text
            assert stream or (reply.status_code == 500 and reply.headers["x-should-retry"] == "false")
            assert client.in_flight == 0

    async def test_the_queue_is_full(self) -> None:
        async with in_process() as (http, client):
            client.max_in_flight = 2
            reply = await http.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
            assert reply.status_code == 429 and reply.headers["retry-after"] == "3"
            assert client.in_flight == 0, "the prompts that were taken are given back"

    async def test_our_own_bug_is_one_clean_reply(self) -> None:
        client = FakeClient()
        client.snapshot = None  # type: ignore[method-assign, assignment]
        async with in_process(client) as (http, _):
            reply = await http.get("/metrics")
        assert reply.status_code == 500
        assert reply.json()["error"]["message"] == "The server had an internal error."
        assert isinstance(httpx.Headers(reply.headers)["x-request-id"], str)
