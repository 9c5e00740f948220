"""All live requests of one client: admission, the way from outputs to their callers, and ends.

    submit -> Live in the table -> outputs -> Choice.push -> caller's RequestStream wakes -> TokenEvent
                                                  | stop string
                                                  '-> cancel(wire id, index) to the engine

Lives on one asyncio loop; only `RequestStream.__del__` may run elsewhere. Knows no processes and no threads:
how the engine is told is a function it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from engine.errors import Draining, EngineDead, InvalidRequest, Overloaded
from engine.sched.limits import RequestLimits
from engine.text.choice import Choice
from engine.text.tokenizer import Tokenizer
from engine.types import EngineInfo, FinishReason, SamplingParams, TokenEvent, TokenOutput

log = logging.getLogger(__name__)

# Completions of this long ago say little about now.
_RATE_WINDOW_S = 30.0
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_UNKNOWN_RETRY_S = 5.0

Cancel = Callable[[str, int | None], None]


def check_request(info: EngineInfo, prompt_ids: Sequence[int], params: SamplingParams) -> None:
    """Refuses what the engine could never do, with the rules the engine itself applies.

    Raises:
        InvalidRequest, ContextTooLong, NeverFits: with the numbers in the message.
    """
    limits = RequestLimits(
        info.vocab_size, info.max_model_len, info.max_num_seqs, info.largest_request_tokens, info.embeddings
    )
    limits.check_prompt(prompt_ids)
    limits.max_output(len(prompt_ids), params)


class Live:
    """A request in flight.

    Attributes:
        wire_id: what the engine knows it by. Never used twice, so that an output that is late cannot reach
            another request of the same id.
    """

    __slots__ = ("choices", "error", "open", "ready", "request_id", "waiter", "wire_id")

    def __init__(self, request_id: str, wire_id: str, choices: tuple[Choice, ...]) -> None:
        self.request_id = request_id
        self.wire_id = wire_id
        self.choices = choices
        self.open = len(choices)
        self.ready: dict[int, None] = {}  # choices with something to show, in order of arrival
        self.error: EngineDead | None = None
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class RequestTable:
    """The live requests.

    Args:
        tokenizer: turns the engine's tokens into text.
        cancel: tells the engine to end a request, or one choice of it.
    """

    def __init__(self, tokenizer: Tokenizer, cancel: Cancel) -> None:
        self._tokenizer = tokenizer
        self._cancel = cancel
        self._by_wire_id: dict[str, Live] = {}
        self._by_request_id: dict[str, Live] = {}
        self._wire_ids = itertools.count(1)
        self._in_flight = 0
        self._completed_s: deque[float] = deque(maxlen=512)
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def admit(
        self, info: EngineInfo, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> RequestStream:
        """Checks a request and makes its place; the caller sends it to the engine.

        Raises:
            RequestError, Overloaded, Draining.
        """
        if self.draining:
            raise Draining("The server is shutting down and takes no new requests.")
        if request_id in self._by_request_id:
            raise InvalidRequest("A request with this id is already running.", "request_id")
        check_request(info, prompt_ids, params)
        self._check_load(info.max_num_seqs + info.max_queued_requests, params.n)
        choices = tuple(Choice(i, self._tokenizer, prompt_ids, params) for i in range(params.n))
        live = Live(request_id, str(next(self._wire_ids)), choices)
        self._by_wire_id[live.wire_id] = self._by_request_id[request_id] = live
        self._in_flight += params.n
        self._idle.clear()
        return RequestStream(self, live)

    def _check_load(self, most: int, wanted: int) -> None:
        excess = self._in_flight + wanted - most
        if excess > 0:
            raise Overloaded(
                f"The server is busy: {self._in_flight} sequences are running or queued, {most} are allowed.",
                self._retry_after_s(excess),
            )

    def _retry_after_s(self, excess: int) -> float:
        """When `excess` more choices will have ended, at the recent rate."""
        now = time.monotonic()
        recent = [when for when in self._completed_s if now - when < _RATE_WINDOW_S]
        if not recent:
            return _UNKNOWN_RETRY_S
        rate = len(recent) / max(now - recent[0], 0.1)
        return min(max(excess / rate, _MIN_RETRY_S), _MAX_RETRY_S)

    def dispatch(self, outputs: Sequence[TokenOutput]) -> None:
        """Hands the engine's outputs to their requests. Late ones, after an abort, fall through."""
        by_wire_id = self._by_wire_id
        for output in outputs:
            live = by_wire_id.get(output.request_id)
            if live is not None:
                choice = live.choices[output.index]
                if not choice.ended:
                    self._push(live, choice, output)

    def _push(self, live: Live, choice: Choice, output: TokenOutput) -> None:
        try:
            show = choice.push(output)
        except Exception:
            log.exception("request %s could not be turned into text", live.request_id)
            self._break(live, choice)
            return
        if show:
            live.ready[choice.index] = None
            live.wake()
            if choice.ended:
                self._choice_ended(live, choice)

    def _break(self, live: Live, choice: Choice) -> None:
        """One request's fault stays with it."""
        self._cancel(live.wire_id, choice.index)
        self._end_choice(live, choice, FinishReason.ERROR, "The text of this request could not be made.")

    def _end_choice(self, live: Live, choice: Choice, reason: FinishReason, error: str | None = None) -> None:
        choice.end(reason, error)
        live.ready[choice.index] = None
        self._choice_ended(live, choice)
        live.wake()

    def _choice_ended(self, live: Live, choice: Choice) -> None:
        if choice.stopped_here:
            self._cancel(live.wire_id, choice.index)
        self._completed_s.append(time.monotonic())
        self._in_flight -= 1
        live.open -= 1
        if not live.open:
            self._forget(live)

    def _forget(self, live: Live) -> None:
        self._in_flight -= live.open
        live.open = 0
        del self._by_wire_id[live.wire_id], self._by_request_id[live.request_id]
        if not self._by_wire_id:
            self._idle.set()

    def abort(self, request_id: str) -> None:
        """Ends what is left of a request with ABORT events. Unknown ids are ignored."""
        live = self._by_request_id.get(request_id)
        if live is None:
            return
        self._cancel(live.wire_id, None)
        for choice in live.choices:
            if not choice.ended:
                self._end_choice(live, choice, FinishReason.ABORT)

    def drop(self, live: Live) -> None:
        """The caller no longer listens: ends what is left without a word."""
        if live.open:
            self._cancel(live.wire_id, None)
            self._forget(live)

    def public_id(self, wire_id: str) -> str:
        """What the caller named a live request; "" for one that ended."""
        live = self._by_wire_id.get(wire_id)
        return "" if live is None else live.request_id

    def fail_all(self, message: str) -> None:
        """The engine is gone: every caller gets EngineDead, after the events that are already there."""
        for live in list(self._by_wire_id.values()):
            live.error = EngineDead(message)
            self._forget(live)
            live.wake()

    async def drained(self) -> None:
        """Returns once nothing is in flight."""
        await self._idle.wait()


class RequestStream(AsyncIterator[TokenEvent]):
    """One request's events. For one consumer; whoever stops early calls `aclose` or lets go of it."""

    __slots__ = ("_live", "_loop", "_table")

    def __init__(self, table: RequestTable, live: Live) -> None:
        self._table = table
        self._live = live
        self._loop = asyncio.get_running_loop()

    @property
    def wire_id(self) -> str:
        return self._live.wire_id

    async def __anext__(self) -> TokenEvent:
        live = self._live
        while not live.ready:
            if live.error is not None:
                raise live.error
            if not live.open:
                raise StopAsyncIteration
            live.waiter = self._loop.create_future()
            try:
                await live.waiter
            except asyncio.CancelledError:
                self._table.drop(live)
                raise
        index = next(iter(live.ready))
        del live.ready[index]
        return live.choices[index].take()

    async def aclose(self) -> None:
        """Aborts what is left."""
        self._table.drop(self._live)
        self._live.ready.clear()

    def __del__(self) -> None:
        # Garbage may be collected on any thread.
        if self._live.open and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._table.drop, self._live)
