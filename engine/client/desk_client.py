"""What both clients do in the same way: by their table of requests and their desk for questions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from engine.client.questions import QuestionDesk
from engine.client.requests import RequestTable
from engine.errors import EngineDead
from engine.grammar import Grammar
from engine.process import frames
from engine.text.tokenizer import Tokenizer
from engine.types import EngineInfo, EngineSnapshot, SamplingParams, TokenEvent
from engine.views import DEFAULT_SCOPE, BlockDetail, CachePage, CacheReport, CacheScope, PoolFrame

NOT_STARTED = "The engine is not started."
STOPPED = "The engine was stopped."


class DeskClient:
    """The part of an EngineClient that does not depend on where the engine runs."""

    restarts = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._table = RequestTable(tokenizer, self._cancel)
        self._desk = QuestionDesk(self._send, lambda: self._why_dead)
        self._info: EngineInfo | None = None
        self._snapshot = EngineSnapshot()
        self._why_dead: str | None = NOT_STARTED

    def _send(self, frame: frames.ToEngine) -> None:
        """To an engine that lives; else whatever it is about is over."""
        raise NotImplementedError

    def _cancel(self, wire_id: str, index: int | None) -> None:
        self._send(frames.Abort(wire_id, index))

    def _receive(self, frame: frames.Outputs | frames.Answer | frames.Pool) -> None:
        """Takes what the engine said."""
        if not isinstance(frame, frames.Outputs):
            self._desk.receive(frame)
            return
        if frame.snapshot is not None:
            self._snapshot = frame.snapshot
        self._table.dispatch(frame.outputs)

    def _end(self, reason: str) -> None:
        """From here on there is no engine; whoever waits for it is told."""
        self._why_dead = reason
        self._table.fail_all(reason)
        self._desk.fail_all(reason)

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDead(NOT_STARTED)
        return self._info

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        scope: CacheScope = DEFAULT_SCOPE,
        *,
        explain: bool = False,
    ) -> AsyncIterator[TokenEvent]:
        if self._why_dead is not None and not self._table.draining:
            raise EngineDead(self._why_dead)
        stream = self._table.admit(self.info, request_id, prompt_ids, params)
        self._send(frames.Submit(stream.wire_id, frames.pack_ids(prompt_ids), params, scope, explain))
        return stream

    def abort(self, request_id: str) -> None:
        self._table.abort(request_id)

    def snapshot(self) -> EngineSnapshot:
        return self._snapshot

    async def probe_cache(self, prompt_ids: Sequence[int], scope: CacheScope = DEFAULT_SCOPE) -> CacheReport:
        return await self._desk.probe(self.info, prompt_ids, scope)

    async def compile_grammar(self, grammar: Grammar) -> None:
        await self._desk.compile(grammar)

    async def cache_page(self, first_block: int = 1, limit: int = 1000, state: str = "") -> CachePage:
        return await self._desk.page(first_block, limit, state)

    async def cache_block(self, block_id: int) -> BlockDetail | None:
        return await self._desk.block(block_id)

    async def reset_cache(self) -> int:
        return await self._desk.reset()

    def watch_pool(self) -> AsyncIterator[PoolFrame]:
        return self._desk.watch()

    def public_id(self, number: str) -> str:
        return self._table.public_id(number)

    def health(self) -> str | None:
        return self._why_dead

    def start_draining(self) -> None:
        self._table.draining = True

    async def drained(self) -> None:
        await self._table.drained()
