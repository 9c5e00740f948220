"""A real server and raw sockets: what proper HTTP clients never send, and what they never get to see."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from server.settings import ServerSettings
from tests.contract.openai_schema import check
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import CHAT, HELLO, Live, chat_text, frames, live

QUICK = ServerSettings(header_timeout_s=0.3, body_timeout_s=0.3, keep_alive_s=5, stall_timeout_s=0.4)
KEYED = replace(QUICK, api_keys=("first-key", "second-key"))


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(QUICK) as running:
        yield running


@pytest.fixture(scope="module")
def keyed() -> Iterator[Live]:
    with live(KEYED) as running:
        yield running


def talk(server: Live, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Sends the parts and reads until the server closes, or for a moment after its answer."""
    with connection(server) as sock:
        with contextlib.suppress(OSError):
            for part in parts:
                sock.sendall(part)
                time.sleep(pause_s)
        return read(sock)


def connection(server: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def read(sock: socket.socket) -> bytes:
    """Until the end, or until a reply with a length is whole."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while not whole(received):
            data = sock.recv(65536)
            if not data:
                break
            received += data
    return received


def whole(received: bytes) -> bool:
    head, separator, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    if length is not None:
        return bool(separator) and len(body) >= int(length[1])
    return body.endswith(b"0\r\n\r\n")


def refused(reply: bytes, status: int) -> None:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), reply[:300]
    check("ErrorResponse", json.loads(body))


def request(path: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def post(body: dict[str, Any], path: str = CHAT) -> bytes:
    data = json.dumps(body).encode()
    return request(
        path, "Content-Type: application/json", f"Content-Length: {len(data)}", method="POST", body=data
    )


MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "forged host": b"GET /nothing HTTP/1.1\r\nHost: x/v1/models?\r\n\r\n",
    "length and chunks": request(CHAT, "Content-Length: 3", "Transfer-Encoding: chunked", method="POST")
    + b"0\r\n\r\n",
    "two lengths": request(CHAT, "Content-Length: 3", "Content-Length: 4", method="POST") + b"abcd",
    "negative length": request(CHAT, "Content-Length: -1", method="POST"),
    "space in a header name": request("/v1/models", "Bad Name: x"),
    "line feed in a header": request("/v1/models", "X: a\n b: c\x00"),
    "not ASCII in the address": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad chunk": request(CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST")
    + b"zz\r\n{}\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests(server: Live, name: str) -> None:
    refused(talk(server, MALFORMED[name]), 400)
    still_serves(server)


def still_serves(server: Live) -> None:
    assert talk(server, request("/health")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "path",
    ["/v1/../v1/models", "/v1/%2e%2e/v1/models", "//v1/models", "/./v1/models", "/v1/models?x=%00/../health"],
)
def test_paths_are_taken_as_they_are(keyed: Live, path: str) -> None:
    """No normalising: without a key, none of them is a way in."""
    refused(talk(keyed, request(path)), 401)


def test_a_forged_host_does_not_open_the_door(keyed: Live) -> None:
    for host in ("x/health?", "x/health", "localhost/version#"):
        reply = talk(keyed, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        refused(reply, 400)
    refused(talk(keyed, b"GET http://x/v1/models HTTP/1.1\r\nHost: /health\r\n\r\n"), 400)


def test_a_head_of_twenty_megabytes(server: Live) -> None:
    with connection(server) as sock:
        sent = 0
        with contextlib.suppress(OSError):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
            while sent < 20 << 20:
                sent += sock.send(b"a" * 65536)
        assert sent < 20 << 20, "the server read on"
    refused(talk(server, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 100_000), 431)
    still_serves(server)


def test_a_large_head_in_one_piece(server: Live) -> None:
    """Also where the whole head comes in a single read."""
    refused(talk(server, request("/health", *(f"X-{n}: {'a' * 1000}" for n in range(100)))), 431)


def test_two_thousand_headers(server: Live) -> None:
    refused(talk(server, request("/health", *(f"X-{number}: a" for number in range(2000)))), 431)


def test_a_long_address(server: Live) -> None:
    refused(talk(server, request("/" + "a" * 9000)), 414)


def test_a_large_body_is_not_a_large_head(server: Live) -> None:
    reply = talk(server, post({"messages": [{"role": "user", "content": "x"}], "user": "u" * 200_000}))
    assert reply.startswith(b"HTTP/1.1 200 ")


def test_a_huge_content_length_is_refused_at_once(server: Live) -> None:
    reply = talk(
        server, request(CHAT, "Content-Type: application/json", "Content-Length: 99999999999", method="POST")
    )
    refused(reply, 413)
    assert b"connection: close" in reply


def test_expect_continue_is_not_granted_to_a_body_that_is_too_large(server: Live) -> None:
    head = request(CHAT, "Content-Length: 99999999999", "Expect: 100-continue", method="POST")
    assert b"100 Continue" not in talk(server, head)


def test_a_head_that_drips(server: Live) -> None:
    """One byte now and then does not keep a connection."""
    started_s = time.monotonic()
    with connection(server) as sock, contextlib.suppress(OSError):
        for byte in b"GET /health HTTP/1.1\r\nHost: xxxxxxxxxxxxxxxxxxxxxxxxxxx":
            sock.sendall(bytes([byte]))
            time.sleep(0.05)
            if time.monotonic() - started_s > 3:
                pytest.fail("still open")
        sock.recv(1000)
    assert time.monotonic() - started_s < 2.5


def test_a_connection_that_says_nothing(server: Live) -> None:
    with connection(server) as sock:
        assert sock.recv(10) == b""


def test_a_body_that_drips(server: Live) -> None:
    reply = talk(
        server,
        request(CHAT, "Content-Type: application/json", "Content-Length: 100", method="POST", body=b"{"),
        b" ",
        b" ",
        b" ",
        b" ",
        pause_s=0.15,
    )
    refused(reply, 408)
    still_serves(server)


def test_bytes_after_a_reply_are_on_the_clock_too(server: Live) -> None:
    with connection(server) as sock:
        sock.sendall(request("/health"))
        assert read(sock).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"GET /hea")
        refused(read(sock), 408)


def test_two_requests_on_one_connection(server: Live) -> None:
    with connection(server) as sock:
        for _ in range(2):
            sock.sendall(request("/version"))
            assert read(sock).startswith(b"HTTP/1.1 200 ")


def test_upgrades_are_declined(server: Live) -> None:
    reply = talk(server, request("/version", "Connection: Upgrade", "Upgrade: websocket"))
    assert b" 101 " not in reply


def test_too_many_connections() -> None:
    with live(replace(QUICK, max_connections=2, header_timeout_s=5)) as small:
        with connection(small), connection(small):
            small.until(lambda: len(small.server.server_state.connections) == 2)
            refused(talk(small, b""), 503)
        small.until(lambda: len(small.server.server_state.connections) == 0)
        still_serves(small)


def long_text(_: object, __: object, ___: int) -> str:
    return "x" * 100_000


def test_a_reader_that_stops_is_dropped_and_nobody_waits_for_it() -> None:
    def make() -> FakeClient:
        client = FakeClient(long_text)
        client.tokens_per_event = 10
        return client

    with live(QUICK, make) as server, connection(server) as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.sendall(post({"messages": HELLO, "stream": True, "n": 128}))
        server.until(lambda: server.engine.in_flight == 1)
        still_serves(server)
        server.until(lambda: server.engine.in_flight == 0)
        assert server.engine.aborted


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["before the first token", "while decoding"])
def test_a_caller_who_goes_away_is_noticed(server: Live, stream: bool, phase: str) -> None:
    engine = server.engine
    engine.pause_s = 0.01
    if phase == "before the first token":
        server.call(engine.gate.clear)
    try:
        before = len(engine.aborted)
        with connection(server) as sock:
            sock.sendall(post({"messages": HELLO, "stream": stream, "max_tokens": 1000, "ignore_eos": True}))
            server.until(lambda: engine.in_flight == 1)
            if stream and phase == "while decoding":
                while b"Hel" not in sock.recv(65536).replace(b'"}', b""):
                    break
        server.until(lambda: engine.in_flight == 0, timeout_s=2)
        assert len(engine.aborted) == before + 1
    finally:
        engine.pause_s = 0.0
        server.call(engine.gate.set)
    still_serves(server)


def test_a_caller_who_goes_away_while_sending(server: Live) -> None:
    with connection(server) as sock:
        sock.sendall(
            request(CHAT, "Content-Type: application/json", "Content-Length: 100", method="POST", body=b"{")
        )
    server.until(lambda: server.server.service.metrics.active_requests == 0)
    still_serves(server)


@pytest.mark.parametrize(
    ("path", "fields", "begun"),
    [
        (CHAT, {"messages": HELLO, "n": 2}, rb'"index":1,"delta":\{"role":"assistant"'),
        ("/v1/responses", {"input": "hello"}, rb"event: response.in_progress\n.*\n\n"),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 50}, rb"event: message_start\n.*\n\n"),
    ],
)
def test_a_stream_begins_as_soon_as_the_request_is_queued(
    path: str, fields: dict[str, Any], begun: bytes
) -> None:
    with live(QUICK) as server:
        metrics = server.server.service.metrics
        server.call(server.engine.gate.clear)
        with connection(server) as sock:
            sock.sendall(post({**fields, "stream": True}, path))
            received = b""
            while not re.search(begun, received):
                received += sock.recv(65536)
            assert sum(metrics.first_token_s.data().counts) == 0, "no token, so no time to one"
            server.call(server.engine.gate.set)
            while not received.endswith(b"0\r\n\r\n"):
                received += sock.recv(65536)
        server.until(lambda: sum(metrics.first_token_s.data().counts) == 1)
        server.engine.max_in_flight = 0
        assert talk(server, post({**fields, "stream": True}, path)).startswith(b"HTTP/1.1 429")


def test_an_idle_stream_is_kept_warm() -> None:
    with live(replace(QUICK, sse_keep_alive_s=0.05)) as server:
        server.call(server.engine.gate.clear)
        with connection(server) as sock:
            sock.sendall(post({"messages": HELLO, "stream": True}))
            received = b""
            while received.count(b": keep-alive\n\n") < 2:
                received += sock.recv(65536)
            server.call(server.engine.gate.set)
            while not received.endswith(b"0\r\n\r\n"):
                received += sock.recv(65536)
        text = "".join(re.findall(r"(?:data: .*|: keep-alive)\n\n", received.decode()))
        assert chat_text(frames(text)).startswith("Hello")


def test_keys(keyed: Live) -> None:
    def status(*headers: str, path: str = "/v1/models") -> int:
        return int(talk(keyed, request(path, *headers))[9:12])

    assert status("Authorization: Bearer first-key") == 200
    assert status("Authorization: bearer second-key") == 200
    assert status("X-Api-Key: first-key") == 200
    for path in ("/health", "/ready", "/version"):
        assert status(path=path) == 200
    for path in (
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v1/models",
        "/nothing",
        "/health/",
        "/health/x",
        "/",
    ):
        assert status(path=path) == 401, path
    for header in (
        "Authorization: Bearer wrong",
        "Authorization: Bearer first-key2",
        "Authorization: Bearer first-ke",
        "Authorization: Bearer",
        "Authorization: Basic first-key",
        "Authorization: first-key",
        "Authorization: Bearer \xfc\xe9",
        "X-Api-Key: wrong",
    ):
        assert status(header) == 401, header
    assert status("Authorization: Bearer first-key", "Authorization: Bearer first-key") == 401
    assert status(path="/v1/models?api_key=first-key") == 401
    assert b"www-authenticate: Bearer" in talk(keyed, request("/v1/models"))
