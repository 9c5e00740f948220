"""What both clients answer in the same way: by their table of requests and their desk for questions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from engine.client.questions import QuestionDesk
from engine.client.requests import RequestTable
from engine.grammar import Grammar
from engine.types import EngineInfo, EngineSnapshot
from engine.views import DEFAULT_SCOPE, BlockDetail, CachePage, CacheReport, CacheScope, PoolFrame


class DeskClient:
    """The part of an EngineClient that does not depend on where the engine runs. Its subclass sets these."""

    _table: RequestTable
    _desk: QuestionDesk
    _snapshot: EngineSnapshot

    @property
    def info(self) -> EngineInfo:
        raise NotImplementedError

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

    def start_draining(self) -> None:
        self._table.draining = True

    async def drained(self) -> None:
        await self._table.drained()
