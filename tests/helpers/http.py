"""The server around a FakeClient, in process or on a real socket, and small readers for its answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import uvloop
from jsonschema import Draft202012Validator

from server.app import create_app
from server.port import listen
from server.run import Server
from server.settings import ServerSettings
from server.trail import Tracer
from tests.helpers.fake_client import FakeClient, FakeTemplate, FakeTokenizer

T = TypeVar("T")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
HELLO = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def in_process(
    client: FakeClient | None = None,
    settings: ServerSettings | None = None,
    *,
    wait: bool = True,
    tracer: Tracer | None = None,
    template: FakeTemplate | None = None,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeClient]]:
    """(an HTTP client, the fake engine) without a socket."""
    engine = client or FakeClient()
    chosen = settings or ServerSettings()
    app = create_app(engine, chosen, FakeTokenizer(), template or FakeTemplate(), tracer=tracer)
    async with app.router.lifespan_context(app):
        if wait:
            await app.state.service.started.wait()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield http, engine


@dataclass
class Live:
    """A server on 127.0.0.1 in a thread of its own."""

    port: int
    engine: FakeClient
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function in the server's thread."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Waits until something is true in the server's thread."""

        async def wait() -> None:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await asyncio.sleep(0.002)

        asyncio.run_coroutine_threadsafe(wait(), self.loop).result(timeout_s + 1)


@contextmanager
def live(
    settings: ServerSettings | None = None,
    make: Callable[[], FakeClient] = FakeClient,
    template: FakeTemplate | None = None,
) -> Iterator[Live]:
    """A real server; ends when the block does."""
    started = threading.Event()
    made: list[Live] = []

    async def serve() -> None:
        chosen = settings or ServerSettings()
        engine = make()
        app = create_app(engine, chosen, FakeTokenizer(), template or FakeTemplate())
        with listen("127.0.0.1", 0) as sock:
            server = Server(app, chosen)
            made.append(Live(sock.getsockname()[1], engine, server, asyncio.get_running_loop()))
            await server.run_until_stopped(sock, started.set)

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(20), "the server did not start"
    try:
        yield made[0]
    finally:
        made[0].call(made[0].server.request_stop)
        made[0].call(made[0].server.request_stop)
        thread.join(20)
        assert not thread.is_alive()


def described(document: Any, schema: Any, value: Any) -> None:
    """Fails unless `value` is what our own description says."""
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def frames(text: str) -> list[Any]:
    """The events of a stream, parsed, without the final [DONE]; fails if that is missing."""
    events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
    assert all(event.startswith("data: ") for event in events), events
    assert events[-1] == "data: [DONE]", events[-1:]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def chat_text(chunks: list[Any], index: int = 0) -> str:
    """The text a chat stream said in one choice."""
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def completion_text(chunks: list[Any], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)
