"""GET /v1/cache/events on real sockets: what a viewer gets, and how its stream ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from engine.views import PoolFrame
from server import live as live_module
from server.app import create_app
from server.live import MAX_VIEWERS, EventFeed
from server.settings import ServerSettings
from tests.helpers.fake_client import FakeClient, FakeTemplate, FakeTokenizer
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, Live, live

EVENTS = "/v1/cache/events"
LONG = "a prompt of a few blocks, so that something can be shared. "
COLUMNS = ("refs", "owners", "tenants", "positions", "parents", "taken_ds", "idle_ds")


class Viewer:
    """One open stream, read event by event."""

    def __init__(self, reply: httpx.Response) -> None:
        self.reply = reply
        self._pieces = reply.iter_text()
        self._text = ""

    def next(self, kind: str = "") -> tuple[str, Any]:
        """The next event (of a kind); comments are of the kind "comment"."""
        while True:
            while "\n\n" not in self._text:
                self._text += next(self._pieces)
            event, self._text = self._text.split("\n\n", 1)
            if event.startswith(":"):
                found: tuple[str, Any] = "comment", event
            else:
                name, data = event.split("\n")
                found = name.removeprefix("event: "), json.loads(data.removeprefix("data: "))
            if kind in ("", found[0]):
                return found

    def rest(self) -> list[str]:
        """The kinds of what is left, to the end of the stream."""
        kinds = []
        with contextlib.suppress(StopIteration):
            while True:
                kinds.append(self.next()[0])
        return kinds


@contextlib.contextmanager
def viewer(server: Live, headers: dict[str, str] | None = None) -> Iterator[Viewer]:
    with (
        httpx.Client(base_url=server.url, timeout=20, headers=headers) as http,
        http.stream("GET", EVENTS) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        yield Viewer(reply)


def column(text: str) -> list[int]:
    raw = b64decode(text)
    return [value for (value,) in struct.iter_unpack("<I", raw)]


@pytest.fixture
def server() -> Iterator[Live]:
    with live() as running:
        yield running


def post(server: Live, path: str, body: dict[str, Any], **kwargs: Any) -> Any:
    reply = httpx.post(server.url + path, json=body, timeout=20, **kwargs)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_hello_then_all_of_the_pool_then_what_changes(server: Live) -> None:
    with viewer(server) as page:
        kind, hello = page.next()
        assert kind == "hello" and hello["num_blocks"] == 512 and hello["block_size"] == 16
        assert hello["model"] == "quire-demo" and isinstance(hello["history"], list)
        assert (hello["tenants"], hello["keys_configured"]) == (["default"], False)
        assert {"version", "device", "dtype", "max_model_len", "max_num_seqs"} <= set(hello)
        kind, pool = page.next()
        assert kind == "pool" and pool["full"] and pool["n"] == 513 and pool["ids"] == ""
        assert all(column(pool[name]) == [0] * 513 for name in COLUMNS)
        assert b64decode(pool["kept"]) == bytes(513)
        post(server, COMPLETIONS, {"prompt": LONG, "max_tokens": 4})
        _, change = page.next("pool")
        while column(change["refs"]) and any(column(change["refs"])):
            _, change = page.next("pool")
        assert not change["full"] and column(change["ids"])[:3] == [1, 2, 3]
        assert b64decode(change["kept"])[:3] == b"\1\1\1"
        assert column(change["parents"])[:3] == [0, 1, 2]
        assert [change["tenant_names"][i] for i in column(change["tenants"])[:3]] == ["default"] * 3


def test_lanes_have_both_names(server: Live) -> None:
    server.call(server.engine.gate.clear)
    with viewer(server) as page:
        done = threading.Thread(target=post, args=(server, CHAT, {"messages": HELLO, "n": 2}))
        done.start()
        _, pool = page.next("pool")
        while len(pool["lanes"]) < 2:
            _, pool = page.next("pool")
        one, two = pool["lanes"]
        assert one["request_id"] == two["request_id"] and one["request_id"].startswith("chatcmpl-")
        assert (one["index"], two["index"], one["tenant"]) == (0, 1, "default")
        assert one["id"] == two["id"] == max(column(pool["owners"])) and one["prompt_tokens"] == 8
        server.call(server.engine.gate.set)
        done.join()


def test_samples(server: Live) -> None:
    with viewer(server) as page:
        page.next("pool")
        server.call(server.server.service.history.sample)
        _, sample = page.next("sample")
        assert sample["blocks"]["free"] == 512 and "whatif" in sample
    with viewer(server) as page:
        assert sample in page.next()[1]["history"]


def test_a_viewer_who_leaves_is_noticed_at_once(server: Live) -> None:
    feed = server.server.service.feed
    for _ in range(3):
        with viewer(server) as page:
            page.next("pool")
            assert (feed.viewers, server.engine.watchers) == (1, 1)
        server.until(lambda: feed.viewers == 0 and server.engine.watchers == 0)


def test_idle_streams_are_kept_warm() -> None:
    with live(ServerSettings(sse_keep_alive_s=0.05)) as server, viewer(server) as page:
        assert page.next("comment") == ("comment", ": keep-alive")


def test_a_dead_engine_is_followed_by_the_next_one(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "RETRY_S", 0.01)

    def set_sickness(value: str | None) -> None:
        server.engine.sickness = value

    with viewer(server) as page:
        page.next("pool")
        server.call(lambda: set_sickness("it was killed"))
        assert page.next("engine") == ("engine", {"up": False})
        server.until(lambda: server.engine.watchers == 0)
        server.call(lambda: set_sickness(None))
        assert page.next()[0] == "hello"
        kind, pool = page.next()
        assert kind == "pool" and pool["full"]


def test_a_drain_ends_every_stream() -> None:
    """And does not wait for them."""
    with (
        live(ServerSettings(shutdown_timeout_s=20.0)) as server,
        viewer(server) as one,
        viewer(server) as two,
    ):
        for page in (one, two):
            page.next("pool")
        began_s = time.monotonic()
        server.call(server.server.request_stop)
        for page in (one, two):
            assert set(page.rest()) <= {"pool", "sample", "comment"}
        assert time.monotonic() - began_s < 10


def test_so_many_and_no_more(server: Live) -> None:
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(viewer(server)) for _ in range(MAX_VIEWERS)]
        for page in pages:
            page.next("hello")
        reply = httpx.get(server.url + EVENTS)
        assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 0
        assert reply.json()["error"]["code"] == "too_many_viewers"
        post(server, CHAT, {"messages": HELLO})
    server.until(lambda: server.server.service.feed.viewers == 0)
    with viewer(server) as page:
        page.next("pool")


def test_one_who_does_not_read_holds_up_nobody(server: Live) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stuck.sendall(f"GET {EVENTS} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        server.until(lambda: server.engine.watchers == 1)
        with viewer(server) as page:
            for _ in range(4):
                post(server, CHAT, {"messages": HELLO})
                page.next("pool")
    server.until(lambda: server.engine.watchers == 0)


def test_they_are_not_generation_requests(server: Live) -> None:
    with viewer(server) as page:
        page.next("pool")
        text = httpx.get(server.url + "/metrics").text
        assert 'quire_requests_received_total{api="chat"} 0.0' in text
        assert "quire_http_requests_active 2.0" in text
    server.until(lambda: server.server.service.feed.viewers == 0)
    text = httpx.get(server.url + "/metrics").text
    assert f'quire_http_requests_total{{method="GET",route="{EVENTS}",status="200"}} 1.0' in text


def test_only_an_admin_may_watch() -> None:
    with live(ServerSettings(api_keys=("one",), admin_keys=("root",))) as server:
        for headers, status in (({}, 401), ({"authorization": "Bearer one"}, 403)):
            reply = httpx.get(server.url + EVENTS, headers=headers)
            assert reply.status_code == status
        assert server.engine.watchers == 0
        with viewer(server, {"authorization": "Bearer root"}) as page:
            _, hello = page.next("hello")
            assert (hello["tenants"], hello["keys_configured"]) == (["key-1", "admin"], True)


async def _answers(client: FakeClient, settings: ServerSettings) -> Any:
    app = create_app(client, settings, FakeTokenizer(), FakeTemplate())
    service = app.state.service
    await client.start()
    return service


def test_a_frame_is_written_once_however_many_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []

    def counted(raw: bytes) -> bytes:
        encoded.append(raw)
        return b""

    async def run() -> None:
        service = await _answers(FakeClient(), ServerSettings())
        monkeypatch.setattr(live_module, "b64encode", counted)
        frames = [_frame(number) for number in range(3)]
        for frame in frames:
            first = service.feed.pool(frame)
            assert all(service.feed.pool(frame) is first for _ in range(10))
        assert len(encoded) == 3 * 9
        assert service.feed.pool(_frame(0)) == service.feed.pool(frames[0])

    asyncio.run(run())


def _frame(sequence: int) -> PoolFrame:
    return PoolFrame(sequence, False, 1, ("",), *[b"\0\0\0\0"] * 2, b"\0", *[b"\0\0\0\0"] * 6)


def test_nothing_is_gathered_for_a_viewer_who_does_not_read() -> None:
    """While one write waits, the engine's frames are not even asked for."""

    async def run() -> None:
        client = FakeClient()
        client.frame_s = 0.0
        service = await _answers(client, ServerSettings())
        sent: list[bytes] = []
        reads = asyncio.Event()
        left = asyncio.Event()

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if len(sent) > 2:
                await reads.wait()

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        stream = asyncio.create_task(EventFeed(service, service.feed)({"type": "http"}, receive, send))
        while len(sent) < 3:
            await asyncio.sleep(0)
        for number in range(200):  # each would be a frame
            client.pool.admit(number, 0, [number] * 16, _scope())
            client.pool.release(number)
            await asyncio.sleep(0)
        assert len(sent) == 3
        reads.set()
        while len(sent) < 4:
            await asyncio.sleep(0)
        assert json.loads(sent[3].split(b"data: ")[1])["n"] == 200, "all of it in one frame"
        left.set()
        await stream
        assert (service.feed.viewers, client.watchers) == (0, 0)

    asyncio.run(run())


def _scope() -> Any:
    from engine.views import DEFAULT_SCOPE

    return DEFAULT_SCOPE
