"""A running generation -> server-sent events on one connection; and the wait for a whole reply.

Knows ASGI messages, disconnects and keep-alives; does not know what is inside a chunk. Frames go straight to
ASGI `send`: a token costs this file one loop turn. A caller who goes away is noticed at once, before the
first token too, because one task does nothing but listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from engine.errors import EngineDead, QuireError
from engine.types import TokenEvent
from server.errors import ApiError, to_api_error
from server.generation import Generation
from server.render import Frames
from server.service import Phase, Service
from server.sse import EventsResponse, reader_gone

logger = logging.getLogger("quire")


class EventStream(EventsResponse):
    """The response of a streamed request, which the engine has taken: what it refuses gets a status instead.

    Args:
        chunks: writes the frames; those before the first token's are sent at once.
    """

    def __init__(
        self, service: Service, generation: Generation, chunks: Frames, headers: dict[str, str]
    ) -> None:
        super().__init__("no-cache", headers)
        self._service = service
        self._generation = generation
        self._chunks = chunks
        self._frames_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        listener = asyncio.create_task(self._listen(receive, send))
        try:
            await self._send_events(send)
        except asyncio.CancelledError:
            # Only a server that is being forced down cancels a request.
            await self._send_last(send, self._chunks.failed(_shutting_down()))
            raise
        except QuireError as exc:
            await self._send_last(send, self._chunks.failed(_explain(exc, self._service)))
        except Exception:
            logger.exception("request %s failed while streaming", self._generation.id)
            error = ApiError(500, "The server had an internal error.")
            await self._send_last(send, self._chunks.failed(error))
        finally:
            listener.cancel()
            await self._generation.close()

    async def _send_events(self, send: Send) -> None:
        render = self._chunks.event
        begun = self._chunks.begin()
        if begun:
            await send({"type": "http.response.body", "body": begun, "more_body": True})
        async for choice, event in self._generation.events():
            frames = render(choice, event)
            if frames:
                self._frames_sent += 1
                await send({"type": "http.response.body", "body": frames, "more_body": True})
        await self._send_last(send, self._chunks.end())

    async def _send_last(self, send: Send, frames: bytes) -> None:
        await send({"type": "http.response.body", "body": frames, "more_body": False})

    async def _listen(self, receive: Receive, send: Send) -> None:
        """Ends the generation when the caller goes away; keeps an idle connection warm until then."""
        seen = 0
        while True:
            try:
                async with asyncio.timeout(self._service.settings.sse_keep_alive_s or None):
                    message = await receive()
            except TimeoutError:
                if seen == self._frames_sent:
                    await send(
                        {"type": "http.response.body", "body": self._chunks.keep_alive, "more_body": True}
                    )
                seen = self._frames_sent
                continue
            if message["type"] == "http.disconnect":
                self._generation.abort()
                return


class TakesEvents(Protocol):
    """What a choice's events are collected in."""

    def add(self, event: TokenEvent) -> None: ...


async def collect(
    service: Service, generation: Generation, receive: Receive, choices: Sequence[TakesEvents]
) -> None:
    """Waits for a whole generation; each of its choices' events are taken by one of `choices`.

    Raises:
        ClientDisconnect: the caller went away; nothing is left running.
        QuireError: as the engine says.
    """
    async with _abort_on_disconnect(generation, receive):
        try:
            async for choice, event in generation.events():
                choices[choice].add(event)
        except EngineDead as exc:
            raise _explain(exc, service) from exc
    if generation.aborted:
        raise ClientDisconnect


@asynccontextmanager
async def _abort_on_disconnect(generation: Generation, receive: Receive) -> AsyncIterator[None]:
    async def listen() -> None:
        await reader_gone(receive)
        generation.abort()

    listener = asyncio.create_task(listen())
    try:
        yield
    finally:
        listener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listener
        await generation.close()


def _explain(exc: QuireError, service: Service) -> ApiError:
    """During a shutdown the engine ends because we end it: say so."""
    if service.phase is Phase.DRAINING and isinstance(exc, EngineDead):
        return _shutting_down()
    return to_api_error(exc)


def _shutting_down() -> ApiError:
    return ApiError(
        503,
        "The server shut down before this request could finish.",
        code="shutting_down",
        headers={"retry-after": "2", "connection": "close"},
    )
