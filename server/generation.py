"""One HTTP request's work in the engine: its prompts submitted together, their events as one stream.

Knows the engine client and what to count; does not know how replies are written. Whatever happens (an
error, a caller who goes away, a cancelled task), `close` leaves nothing running in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from engine.client import EngineClient
from engine.errors import Overloaded, RequestFailed
from engine.types import FinishReason, SamplingParams, TokenEvent
from engine.views import CacheReport, CacheScope
from server.metrics import RequestMetrics
from server.prompts import Prompt
from server.trail import Timeline

logger = logging.getLogger("quire")

# Prompts of one request that are in the engine at once: a long list leaves room for others.
MAX_IN_FLIGHT = 128


class Generation:
    """A submitted request.

    Attributes:
        id: the reply's id and the stem of the engine's request ids; ours, never the caller's.
        prompts: in the order of the request; choice c belongs to prompt c // n.
        timeline: when what happened. error: what ended it, if something did.
        prompts_cached_tokens: of each prompt, how many of its tokens were reused.
        reports: the same with why not more; None until its first event, or where it was not asked.
    """

    def __init__(
        self,
        client: EngineClient,
        request_id: str,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        record: RequestMetrics,
        scope: CacheScope,
        *,
        explain: bool = False,
    ) -> None:
        self.id = request_id
        self.prompts = prompts
        self.params = params
        self.aborted = False
        self.completion_tokens = 0
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self.timeline = Timeline(len(prompts))
        self.error: BaseException | None = None
        self.reports: list[CacheReport | None] = [None] * len(prompts)
        self.explains = explain
        self._scope = scope
        self.prompts_cached_tokens = [0] * len(prompts)
        self._client = client
        self._record = record
        self._engine_ids = [f"{request_id}-{position}" for position in range(len(prompts))]
        self._streams: list[AsyncIterator[TokenEvent]] = []
        self._lanes = 0

    def submit(self) -> None:
        """Queues every prompt, or none. Of a long list the others follow as the first ones end.

        Raises:
            RequestError, Overloaded, Draining, EngineDead: as the engine says.
        """
        self.timeline.submitted()
        try:
            for _ in self.prompts[: self._most_at_once()]:
                self._submit_next()
        except BaseException:
            self._release()
            raise
        self._record.admitted()

    def _most_at_once(self) -> int:
        """As many prompts as the queue has places for, when it is empty, up to MAX_IN_FLIGHT."""
        info = self._client.info
        return max(1, min(MAX_IN_FLIGHT, (info.max_num_seqs + info.max_queued_requests) // self.params.n))

    def _submit_next(self) -> None:
        position = len(self._streams)
        ids, engine_id = self.prompts[position].ids, self._engine_ids[position]
        self._streams.append(
            self._client.submit(engine_id, ids, self.params, self._scope, explain=self.explains)
        )

    def abort(self) -> None:
        """Ends what is left; the event stream then ends."""
        self.aborted = True
        self._release()

    def _release(self) -> None:
        for engine_id in self._engine_ids[: len(self._streams)]:
            self._client.abort(engine_id)

    async def close(self) -> None:
        """Leaves nothing running. Harmless when everything has ended."""
        self._release()
        for stream in self._streams:
            await close_stream(stream)
        self._record.ended("aborted")

    @property
    def cached_tokens(self) -> int:
        return sum(self.prompts_cached_tokens)

    @property
    def engine_numbers(self) -> list[str]:
        """What the engine's own lines in the log call the prompts of this request."""
        return [getattr(stream, "wire_id", "") for stream in self._streams]

    @property
    def usage(self) -> dict[str, object]:
        """The usage object so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """(choice, event) until every choice has ended, or nothing more after an abort.

        Raises:
            RequestFailed: a choice broke; the others are aborted by whoever closes.
            EngineDead: as the engine says.
        """
        try:
            if len(self._streams) == 1:
                async for event in self._streams[0]:
                    self._note(0, event)
                    yield event.index, event
            else:
                lanes = [self._lane(position) for position in range(len(self._streams))]
                self._lanes = len(lanes)
                async for position, event in _merged(lanes):
                    self._note(position, event)
                    yield position * self.params.n + event.index, event
        except BaseException as exc:
            if not isinstance(exc, GeneratorExit):
                self.error = exc
            self._record.failed(exc)
            raise
        self._record.ended("aborted" if self.aborted else "ok")

    async def _lane(self, position: int) -> AsyncIterator[tuple[int, TokenEvent]]:
        """(position, event) of one prompt, and then of those that nobody has submitted yet.

        Where the queue has no room for another, the lane ends, unless it is the last.
        """
        while True:
            async for event in self._streams[position]:
                yield position, event
            position = len(self._streams)
            if self.aborted or position == len(self.prompts):
                return
            try:
                self._submit_next()
            except Overloaded:
                if self._lanes == 1:
                    raise
                self._lanes -= 1
                return

    def _note(self, position: int, event: TokenEvent) -> None:
        tokens = len(event.token_ids)
        self.completion_tokens += tokens
        if event.finish_reason is not None or self.timeline.prompts[position].first_s is None:
            self.timeline.note(position, event)
        if event.cache is not None:
            self.reports[position] = event.cache
        if event.cached_tokens > self.prompts_cached_tokens[position]:
            self.prompts_cached_tokens[position] = event.cached_tokens
        self._record.tokens(position * self.params.n + event.index, tokens)
        if event.finish_reason is FinishReason.ERROR:
            logger.error("request %s failed in the engine: %s", self.id, event.error)
            raise RequestFailed("This request failed inside the engine.")
        if event.finish_reason is FinishReason.ABORT and not self.aborted:
            raise RequestFailed("This request was cut off inside the engine.")


async def close_stream(stream: AsyncIterator[Any]) -> None:
    """Ends one of the engine client's, wherever it is."""
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        with contextlib.suppress(RuntimeError):
            await aclose()


async def _merged(
    lanes: Sequence[AsyncIterator[tuple[int, TokenEvent]]],
) -> AsyncIterator[tuple[int, TokenEvent]]:
    """Events of several lanes as they come. The first error ends all."""
    queue: asyncio.Queue[tuple[int, TokenEvent] | BaseException | None] = asyncio.Queue(64)

    async def pump(lane: AsyncIterator[tuple[int, TokenEvent]]) -> None:
        try:
            async for item in lane:
                await queue.put(item)
            await queue.put(None)
        except Exception as exc:
            await queue.put(exc)

    tasks = [asyncio.create_task(pump(lane)) for lane in lanes]
    try:
        open_lanes = len(lanes)
        while open_lanes:
            item = await queue.get()
            if item is None:
                open_lanes -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
