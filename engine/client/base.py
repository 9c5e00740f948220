"""What callers may expect of an engine, and what of it does not depend on where it runs.

The server and its tests see this only. Questions and requests are a desk's and a table's (`questions.py`,
`requests.py`); how a frame reaches the engine is each client's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class EngineClient(ABC):
    """An engine, wherever it runs.

    Args:
        tokenizer: for the text of events.

    Attributes:
        restarts: how often a new engine took the place of one that died.
    """

    restarts = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._table = RequestTable(tokenizer, self._cancel)
        self._desk = QuestionDesk(self._send, lambda: self._why_dead)
        self._info: EngineInfo | None = None
        self._snapshot = EngineSnapshot()
        self._why_dead: str | None = NOT_STARTED

    # ---- what a client does in its own way

    @abstractmethod
    async def start(self) -> EngineInfo:
        """Starts the engine and waits until it serves.

        Raises:
            ConfigError: it cannot work; the message is for the operator.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Ends the engine; whatever is in flight gets EngineDead."""

    @abstractmethod
    def _send(self, frame: frames.ToEngine) -> None:
        """To an engine that lives; else whatever it is about is over."""

    # ---- requests

    @property
    def info(self) -> EngineInfo:
        """What the engine decided at start-up; valid after `start`."""
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
        """Queues a request at once and returns its events, of all n choices interleaved.

        With `explain`, each choice's first event has the prompt's CacheReport.

        The iterator ends after every choice had its event with a finish_reason. Closing it early
        (`aclose`, cancellation) aborts what is left.

        Raises (before returning): RequestError, Overloaded, Draining, EngineDead.
        Raises (while iterating): EngineDead, when the engine dies under the request.
        """
        if self._why_dead is not None and not self._table.draining:
            raise EngineDead(self._why_dead)
        stream = self._table.admit(self.info, request_id, prompt_ids, params)
        self._send(frames.Submit(stream.wire_id, frames.pack_ids(prompt_ids), params, scope, explain))
        return stream

    def abort(self, request_id: str) -> None:
        """Ends what is left of a request; its iterator then ends. Unknown ids are ignored."""
        self._table.abort(request_id)

    def public_id(self, number: str) -> str:
        """The request id behind the number that block views and lanes call a live request; "" if it ended."""
        return self._table.public_id(number)

    # ---- the engine's state

    def snapshot(self) -> EngineSnapshot:
        """The newest state the engine reported."""
        return self._snapshot

    def health(self) -> str | None:
        """None while the engine lives and makes progress, else what is wrong."""
        return self._why_dead

    def start_draining(self) -> None:
        """From now on `submit` raises Draining."""
        self._table.draining = True

    async def drained(self) -> None:
        """Returns once nothing is in flight."""
        await self._table.drained()

    # ---- questions

    async def probe_cache(self, prompt_ids: Sequence[int], scope: CacheScope = DEFAULT_SCOPE) -> CacheReport:
        """What of a prompt would be reused if it were submitted now. Changes nothing, counts nothing.

        Raises: what `submit` raises of such a prompt. EngineDead, and RequestFailed where the engine could
            not answer, as do all questions about the cache.
        """
        return await self._desk.probe(self.info, prompt_ids, scope)

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Makes a grammar ready, so that a request with it can begin at once.

        Raises: InvalidRequest, with what is wrong with it; EngineDead.
        """
        await self._desk.compile(grammar)

    async def cache_page(self, first_block: int = 1, limit: int = 1000, state: str = "") -> CachePage:
        """Up to `limit` blocks with ids from `first_block` on; with `state`, those in it only."""
        return await self._desk.page(first_block, limit, state)

    async def cache_block(self, block_id: int) -> BlockDetail | None:
        """One block and its tokens; None where the pool has no such block."""
        return await self._desk.block(block_id)

    async def reset_cache(self) -> int:
        """Forgets all cached content; blocks in use stay with their requests. Returns the blocks emptied."""
        return await self._desk.reset()

    def watch_pool(self) -> AsyncIterator[PoolFrame]:
        """The pool as it changes: a full frame first, then at most five a second while anything changes.

        Ends when the engine does; whoever stops early closes it. Costs the engine nothing without watchers.
        """
        return self._desk.watch()

    # ---- for the clients

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
