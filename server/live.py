"""GET /v1/cache/events: the pool as it changes, and a sample every two seconds, to whoever watches.

Knows frames, samples and their form on the wire; does not know how the engine makes them or what the page
draws. A frame is written once, however many watch. A viewer that reads slowly is not waited for: the client
drops frames for it and begins again with a full one. A dead engine ends no stream: `engine` says
so, and the next one's hello follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from base64 import b64encode
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from engine.views import Lane, PoolFrame
from server import __version__
from server.errors import RETRY_AFTER_S, ApiError
from server.generation import close_stream
from server.render import KEEP_ALIVE, named_event
from server.sse import EventsResponse, reader_gone

if TYPE_CHECKING:
    from server.service import Service

logger = logging.getLogger("quire")

MAX_VIEWERS = 32
# Until a dead engine is asked for again.
RETRY_S = 0.5
# Viewers that keep up are at the same frame, or at the next.
_FRAMES_KEPT = 4
LAST_WORD_S = 1.0
_COLUMNS = (
    *("ids", "refs", "kept", "owners", "tenants", "positions"),
    *("parents", "taken_ds", "idle_ds"),
)

Write = Callable[[bytes], Awaitable[None]]


class Feed:
    """What all viewers of one server share."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._written: OrderedDict[int, tuple[PoolFrame, bytes]] = OrderedDict()
        self._closed = asyncio.Event()
        self.viewers = 0

    def close(self) -> None:
        """Ends every stream."""
        self._closed.set()

    async def closed(self) -> None:
        await self._closed.wait()

    def refusal(self) -> ApiError | None:
        """None while there is room for one more."""
        if self.viewers < MAX_VIEWERS:
            return None
        return ApiError(
            429,
            f"{MAX_VIEWERS} viewers are watching already.",
            kind="rate_limit_error",
            code="too_many_viewers",
            headers={"retry-after": str(RETRY_AFTER_S)},
        )

    def hello(self) -> bytes:
        service, info = self._service, self._service.info
        return named_event(
            "hello",
            {
                "version": __version__,
                "model": service.model_name,
                "device": info.device,
                "dtype": info.dtype,
                "kv_dtype": info.kv_dtype,
                "block_size": info.block_size,
                "num_blocks": info.num_blocks - 1,  # block 0 holds nothing
                "max_model_len": info.max_model_len,
                "max_num_seqs": info.max_num_seqs,
                "tenants": service.tenants.names,
                "keys_configured": service.tenants.keys_configured,
                "history": service.history.samples(),
            },
        )

    def pool(self, frame: PoolFrame) -> bytes:
        """The frame's event. The client hands the same frame to everybody who watches."""
        known = self._written.get(id(frame))
        if known is not None and known[0] is frame:
            return known[1]
        written = named_event("pool", self._plain(frame))
        self._written[id(frame)] = (frame, written)
        while len(self._written) > _FRAMES_KEPT:
            self._written.popitem(last=False)
        return written

    def _plain(self, frame: PoolFrame) -> dict[str, Any]:
        return {
            "sequence": frame.sequence,
            "full": frame.full,
            "now_ds": frame.now_ds,
            "tenant_names": frame.tenant_names,
            "n": len(frame.kept),
            **{name: b64encode(getattr(frame, name)).decode("ascii") for name in _COLUMNS},
            "lanes": [self._lane(lane) for lane in frame.lanes],
            "lanes_left_out": frame.lanes_left_out,
        }

    def _lane(self, lane: Lane) -> dict[str, Any]:
        return {
            "id": int(lane.request_id),
            "request_id": self._service.client.public_id(lane.request_id),
            "index": lane.index,
            "tenant": lane.tenant,
            "phase": lane.phase,
            "prompt_tokens": lane.prompt_tokens,
            "cached_tokens": lane.cached_tokens,
            "computed_tokens": lane.computed_tokens,
            "output_tokens": lane.output_tokens,
            "blocks": lane.blocks,
            "preemptions": lane.preemptions,
            "age_s": round(lane.age_s, 3),
            "priority": lane.priority,
        }

    def forget(self) -> None:
        """Nobody watches any more."""
        self._written.clear()


class EventFeed(EventsResponse):
    """One viewer's stream. Ends when the viewer goes, and when the server shuts down."""

    def __init__(self, service: Service, feed: Feed) -> None:
        super().__init__("no-store")
        self._service = service
        self._feed = feed
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._feed.refusal()
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        turn = asyncio.Lock()

        async def write(data: bytes) -> None:
            async with turn:  # waits as long as the viewer does not read
                await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sent += 1

        self._feed.viewers += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            samples = self._service.history.follow()  # from hello's last one on, however long that takes
            await write(self._feed.hello())
            await _until_one_ends(
                self._pool(write),
                _samples(samples, write),
                self._keep_alive(write),
                reader_gone(receive),
                self._feed.closed(),
            )
        finally:
            self._feed.viewers -= 1
            if not self._feed.viewers:
                self._feed.forget()
        with contextlib.suppress(TimeoutError):  # it may be that nobody reads
            async with asyncio.timeout(LAST_WORD_S):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pool(self, write: Write) -> None:
        client = self._service.client
        while True:
            frames = client.watch_pool()
            try:
                async for frame in frames:
                    await write(self._feed.pool(frame))
            finally:
                await close_stream(frames)
            # The engine died. The one that follows may have another pool.
            await write(named_event("engine", {"up": False}))
            while client.health() is not None:
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(RETRY_S)
            await write(self._feed.hello())

    async def _keep_alive(self, write: Write) -> None:
        every_s = self._service.settings.sse_keep_alive_s
        if not every_s:
            await asyncio.Event().wait()
        while True:
            seen = self._sent
            await asyncio.sleep(every_s)
            if seen == self._sent:
                await write(KEEP_ALIVE)


async def _samples(samples: AsyncIterator[Mapping[str, Any]], write: Write) -> None:
    async for sample in samples:
        await write(named_event("sample", sample))


async def _until_one_ends(*parts: Coroutine[Any, Any, None]) -> None:
    """Runs all of them until one is done; what broke is one line in the log."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.exception() is not None:
                logger.error("a stream of cache events broke", exc_info=task.exception())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
