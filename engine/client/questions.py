"""Questions about the cache, and whether a grammar compiles; and those who watch the pool. Knows neither how
the engine is told nor where it runs.

    ask -> Question sent -> Answer received -> the caller's future
    watch -> Watch sent -> Pool received ... -> each PoolWatch, which keeps a few for a caller that is slow

Lives on one asyncio loop; only `PoolWatch.__del__` may run elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from weakref import WeakSet

from engine.client.requests import check_request
from engine.embedding import Pooling
from engine.errors import EngineDead, InvalidRequest, RequestFailed
from engine.grammar import Grammar
from engine.process import frames
from engine.types import EngineInfo, SamplingParams
from engine.views import BlockDetail, CachePage, CacheReport, CacheScope, PoolFrame

# Three seconds' worth; whoever is further behind begins again with a full frame.
FRAMES_KEPT = 16

# What compiles it has limits of its own, well below.
COMPILE_TIMEOUT_S = 10.0
# More wait here, so that the time is the compiler's.
COMPILED_AT_ONCE = 4

# What a prompt is asked for that is only looked up, and of a model that gives embeddings only.
_NOTHING = SamplingParams(max_tokens=0)
_VECTOR = SamplingParams(max_tokens=0, pooling=Pooling())


class QuestionDesk:
    """The part of a client that asks the engine something.

    Args:
        send: tells the engine, which lives.
        why_dead: None while it does.
    """

    def __init__(
        self, send: Callable[[frames.Question | frames.Watch], None], why_dead: Callable[[], str | None]
    ) -> None:
        self._send = send
        self._why_dead = why_dead
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[frames.Answer]] = {}
        self._watches: WeakSet[PoolWatch] = WeakSet()
        self._compiling = asyncio.Semaphore(COMPILED_AT_ONCE)

    async def probe(self, info: EngineInfo, prompt_ids: Sequence[int], scope: CacheScope) -> CacheReport:
        """Raises what `submit` would of such a prompt."""
        self._check_alive()
        check_request(info, prompt_ids, _VECTOR if info.embeddings.only else _NOTHING)
        ids = frames.pack_ids(prompt_ids)
        report = (await self._ask(lambda number: frames.Probe(number, ids, scope))).report
        assert report is not None
        return report

    async def page(self, first_block: int, limit: int, state: str) -> CachePage:
        page = (await self._ask(lambda number: frames.Page(number, first_block, limit, state))).page
        assert page is not None
        return page

    async def block(self, block_id: int) -> BlockDetail | None:
        return (await self._ask(lambda number: frames.Block(number, block_id))).block

    async def reset(self) -> int:
        return (await self._ask(frames.Reset)).emptied

    async def compile(self, grammar: Grammar) -> None:
        """Raises InvalidRequest: it cannot be compiled, or not in time."""
        async with self._compiling:
            try:
                async with asyncio.timeout(COMPILE_TIMEOUT_S):
                    answer = await self._ask(lambda number: frames.Compile(number, grammar))
            except TimeoutError:
                refusal: str | None = f"The grammar cannot be compiled within {COMPILE_TIMEOUT_S:g} s."
            else:
                refusal = answer.refusal
        if refusal is not None:
            raise InvalidRequest(refusal, "grammar")

    async def _ask(self, question: Callable[[int], frames.Question]) -> frames.Answer:
        """Raises EngineDead; RequestFailed where the engine could not answer."""
        self._check_alive()
        number = next(self._numbers)
        future: asyncio.Future[frames.Answer] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            self._send(question(number))
            answer = await future
        finally:
            del self._asked[number]
        if answer.error is not None:
            raise RequestFailed(answer.error)
        return answer

    def _check_alive(self) -> None:
        if (why := self._why_dead()) is not None:
            raise EngineDead(why)

    def watch(self) -> PoolWatch:
        watch = PoolWatch(self)
        if self._why_dead() is None:
            self._watches.add(watch)
            self.ask_for_all()
        else:
            watch.end()
        return watch

    def ask_for_all(self) -> None:
        """The next frame, which all watchers get, is a full one."""
        if self._why_dead() is None:
            self._send(frames.Watch(True))

    def leave(self, watch: PoolWatch | None = None) -> None:
        """A watcher goes, or went. After the last one the engine stops to show."""
        if watch is not None:
            self._watches.discard(watch)
        if not self._watches and self._why_dead() is None:
            self._send(frames.Watch(False))

    def receive(self, frame: frames.Answer | frames.Pool) -> None:
        """Takes what the engine said."""
        if isinstance(frame, frames.Pool):
            for watch in self._watches:
                watch.push(frame.pool)
        elif (future := self._asked.get(frame.number)) is not None and not future.done():
            future.set_result(frame)

    def fail_all(self, message: str) -> None:
        """The engine is gone: nobody gets an answer, and nothing is left to watch."""
        for future in self._asked.values():
            if not future.done():
                future.set_exception(EngineDead(message))
        watches, self._watches = list(self._watches), WeakSet()
        for watch in watches:
            watch.end()


class PoolWatch(AsyncIterator[PoolFrame]):
    """One watcher's frames. For one consumer; whoever stops early calls `aclose` or lets go of it."""

    def __init__(self, desk: QuestionDesk) -> None:
        self._desk = desk
        self._loop = asyncio.get_running_loop()
        self._frames: deque[PoolFrame] = deque()
        self._behind = True  # what changed is of no use without a full frame first
        self._dropped = False
        self._ended = False
        self._news = asyncio.Event()

    def push(self, frame: PoolFrame) -> None:
        if frame.full:
            self._frames.clear()  # it says all that they say
            self._behind = self._dropped = False
        elif self._behind:
            return
        elif len(self._frames) == FRAMES_KEPT:
            self._frames.clear()
            self._behind = self._dropped = True
            return
        self._frames.append(frame)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    async def __anext__(self) -> PoolFrame:
        while not self._frames:
            if self._ended:
                raise StopAsyncIteration
            if self._dropped:  # only now that somebody reads again
                self._dropped = False
                self._desk.ask_for_all()
            self._news.clear()
            await self._news.wait()
        return self._frames.popleft()

    async def aclose(self) -> None:
        self._frames.clear()
        if not self._ended:
            self.end()
            self._desk.leave(self)

    def __del__(self) -> None:
        # Garbage may be collected on any thread.
        if not self._ended and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._desk.leave)
