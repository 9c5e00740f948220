"""What callers may expect of an engine, wherever it runs. The server and its tests see this only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from engine.grammar import Grammar
from engine.types import EngineInfo, EngineSnapshot, SamplingParams, TokenEvent
from engine.views import DEFAULT_SCOPE, BlockDetail, CachePage, CacheReport, CacheScope, PoolFrame


class EngineClient(Protocol):
    """An engine, wherever it runs."""

    @property
    def info(self) -> EngineInfo:
        """What the engine decided at start-up; valid after `start`."""
        ...

    async def start(self) -> EngineInfo:
        """Starts the engine and waits until it serves.

        Raises:
            ConfigError: it cannot work; the message is for the operator.
        """
        ...

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        scope: CacheScope = DEFAULT_SCOPE,
        *,
        explain: bool = False,
    ) -> AsyncIterator[TokenEvent]:
        """Queues a request at once and returns its events, of all n choices interleaved.

        With `explain`, each choice's first event has the prompt's CacheReport.

        The iterator ends after every choice had its event with a finish_reason. Closing it early
        (`aclose`, cancellation) aborts what is left.

        Raises (before returning): RequestError, Overloaded, Draining, EngineDead.
        Raises (while iterating): EngineDead, when the engine dies under the request.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends what is left of a request; its iterator then ends. Unknown ids are ignored."""
        ...

    def snapshot(self) -> EngineSnapshot:
        """The newest state the engine reported."""
        ...

    async def probe_cache(self, prompt_ids: Sequence[int], scope: CacheScope = DEFAULT_SCOPE) -> CacheReport:
        """What of a prompt would be reused if it were submitted now. Changes nothing, counts nothing.

        Raises: what `submit` raises of such a prompt. EngineDead, and RequestFailed where the engine could
            not answer, as do all questions about the cache.
        """
        ...

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Makes a grammar ready, so that a request with it can begin at once.

        Raises: InvalidRequest, with what is wrong with it; EngineDead.
        """
        ...

    async def cache_page(self, first_block: int = 1, limit: int = 1000, state: str = "") -> CachePage:
        """Up to `limit` blocks with ids from `first_block` on; with `state`, those in it only."""
        ...

    async def cache_block(self, block_id: int) -> BlockDetail | None:
        """One block and its tokens; None where the pool has no such block."""
        ...

    async def reset_cache(self) -> int:
        """Forgets all cached content; blocks in use stay with their requests. Returns the blocks emptied."""
        ...

    def watch_pool(self) -> AsyncIterator[PoolFrame]:
        """The pool as it changes: a full frame first, then at most five a second while anything changes.

        Ends when the engine does; whoever stops early closes it. Costs the engine nothing without watchers.
        """
        ...

    def public_id(self, number: str) -> str:
        """The request id behind the number that block views and lanes call a live request; "" if it ended."""
        ...

    def health(self) -> str | None:
        """None while the engine lives and makes progress, else what is wrong."""
        ...

    def start_draining(self) -> None:
        """From now on `submit` raises Draining."""
        ...

    async def drained(self) -> None:
        """Returns once nothing is in flight."""
        ...

    async def stop(self) -> None:
        """Ends the engine; whatever is in flight gets EngineDead."""
        ...
