"""A whole engine in a few lines: scripted text, one token per byte, no model.

FakeClient keeps the promises of EngineClient (refusals before the first event, one final event per choice,
aborts that end the iterator), so that the server is tested in milliseconds. FakeTokenizer and FakeTemplate
have the interface of engine.text.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.embedding import EmbeddingFacts, Pooling
from engine.errors import (
    ConfigError,
    ContextTooLong,
    Draining,
    EngineDead,
    InvalidRequest,
    NeverFits,
    Overloaded,
)
from engine.grammar import Grammar, GrammarKind
from engine.types import EngineInfo, EngineSnapshot, FinishReason, SamplingParams, TokenEvent, TokenLogprob
from engine.views import DEFAULT_SCOPE, BlockDetail, CachePage, CacheReport, CacheScope, PoolFrame
from tests.helpers.fake_pool import FakePool

VOCAB_SIZE = 260
EMBEDDING_SIZE = 16
USER, ASSISTANT, SYSTEM, END = 256, 257, 258, 259
CONTROL = {USER: "<|user|>", ASSISTANT: "<|assistant|>", SYSTEM: "<|system|>", END: "<|end|>"}
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "tool": USER}

INFO = EngineInfo(
    model="fake",
    architecture="FakeForCausalLM",
    dtype="float32",
    device="cpu",
    backend="fake",
    vocab_size=VOCAB_SIZE,
    max_model_len=4096,
    eos_token_ids=(END,),
    block_size=16,
    num_blocks=513,
    kv_dtype="float32",
    weight_bytes=1 << 20,
    kv_bytes=1 << 22,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    max_queued_requests=256,
    prefix_caching=True,
    largest_request_tokens=2048,
    embeddings=EmbeddingFacts(EMBEDDING_SIZE),
    reasons=(("block_size", "16", "the fake's own"),),
)


class FakeTokenizer:
    """A token is a byte; four more are control tokens that no text encodes to."""

    vocab_size = VOCAB_SIZE
    control: Mapping[str, int] = {text: token_id for token_id, text in CONTROL.items()}
    special_ids = frozenset(CONTROL)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(self.token_bytes(token_id) for token_id in token_ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return CONTROL[token_id].encode() if token_id in CONTROL else bytes([token_id])


class FakeTemplate:
    """<role> text <end> for each message."""

    sources: Mapping[str, str] = {}

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [ROLES[message["role"]], *message["content"].encode("utf-8"), END]
        if kwargs.get("continue_final_message"):
            return ids[:-1]
        return [*ids, ASSISTANT] if add_generation_prompt else ids

    def render_text(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        return FakeTokenizer().decode(self.render(messages, **kwargs))


Script = Callable[[Sequence[int], SamplingParams, int], str]


def hello(prompt_ids: Sequence[int], params: SamplingParams, index: int) -> str:
    """The default script: depends on the prompt and the choice, has a two-byte character."""
    digest = hashlib.sha256(repr(tuple(prompt_ids)).encode()).hexdigest()[:4]
    return f"Hello, wörld {digest} {index}!"


class FakeClient:
    """An EngineClient without an engine.

    Attributes (set by tests):
        script: the text each choice says.
        gate: events wait for it; clear it to hold every stream before its next token.
        die_after: the engine "dies" when a request has made this many events.
        fail_after: a choice ends with an error after this many events.
        max_in_flight: above it, submit raises Overloaded.
        start_error: raised by `start`.
        tokens_per_event, pause_s: the pace.
        report: what every question about the cache gets, in place of the pool's own answer.
        scopes: of each submitted request. probed: (prompt, scope) of each probe.
        pool: its blocks follow the requests, one token per slot; `watch_pool` and the cache pages show it.
        frame_s: between two frames of `watch_pool`.
        watchers: frame streams that are open.
    """

    def __init__(self, script: Script = hello, info: EngineInfo = INFO) -> None:
        self.script = script
        self._info = info
        self.gate = asyncio.Event()
        self.gate.set()
        self.die_after: int | None = None
        self.fail_after: int | None = None
        self.max_in_flight: int | None = None
        self.start_error: Exception | None = None
        self.start_gate = asyncio.Event()
        self.start_gate.set()
        self.tokens_per_event = 1
        self.pause_s = 0.0
        self.sickness: str | None = None
        self.restarts = 0
        self.submitted: list[tuple[str, list[int], SamplingParams]] = []
        self.aborted: list[str] = []
        self.stopped = False
        self._draining = False
        self._live: dict[str, asyncio.Event] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._finished: dict[str, int] = {}
        self.report: CacheReport | None = None
        self.scopes: list[CacheScope] = []
        self.probed: list[tuple[list[int], CacheScope]] = []
        self.compiled: list[Grammar] = []
        self.pool = FakePool(info.num_blocks, info.block_size, info.prefix_caching)
        self.frame_s = 0.02
        self.watchers = 0
        self._numbers: dict[str, int] = {}

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def in_flight(self) -> int:
        return len(self._live)

    async def start(self) -> EngineInfo:
        await self.start_gate.wait()
        if self.start_error is not None:
            raise self.start_error
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
        self._admit(prompt_ids, params)
        assert request_id not in self._live, "request ids must be unique"
        self.submitted.append((request_id, list(prompt_ids), params))
        self.scopes.append(scope)
        report = self._enter(request_id, prompt_ids, params, scope)
        ended = self._live[request_id] = asyncio.Event()
        self._idle.clear()
        return self._events(request_id, self._numbers[request_id], prompt_ids, params, ended, report, explain)

    def _enter(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, scope: CacheScope
    ) -> CacheReport:
        number = self._numbers[request_id] = len(self.submitted)
        reports = [
            self.pool.admit(number, index, prompt_ids, scope, _reads_prefix(params))
            for index in range(params.n)
        ]
        return self.report or reports[0]

    def _admit(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if self._draining:
            raise Draining("draining")
        if self.sickness is not None:
            raise EngineDead(self.sickness)
        self._info.embeddings.check(params.pooling)
        wanted = len(prompt_ids) + (1 if params.max_tokens is None else params.max_tokens)
        if wanted > self._info.max_model_len:
            raise ContextTooLong(
                f"The prompt has {len(prompt_ids)} tokens and max_tokens is {params.max_tokens}; together "
                f"that is more than the context of {self._info.max_model_len} tokens.",
                "max_tokens",
            )
        if wanted > self._info.largest_request_tokens:
            raise NeverFits(f"The request needs {wanted} tokens of KV memory; the pool has fewer.")
        if self.max_in_flight is not None and len(self._live) >= self.max_in_flight:
            raise Overloaded("The queue is full.", retry_after_s=3)

    async def _events(
        self,
        request_id: str,
        number: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        ended: asyncio.Event,
        report: CacheReport,
        explain: bool,
    ) -> AsyncIterator[TokenEvent]:
        choices = [self._choice(prompt_ids, params, index, report) for index in range(params.n)]
        untold = set(range(params.n)) if explain else set()
        made = 0
        try:
            while choices:
                for choice in list(choices):
                    await self._until(self.gate, ended)
                    await asyncio.sleep(self.pause_s)
                    if ended.is_set():
                        return
                    if made == self.die_after or self.stopped:
                        raise EngineDead("the engine process ended")
                    event = next(choice)
                    if made == self.fail_after:
                        event = TokenEvent(
                            event.index, "", (), finish_reason=FinishReason.ERROR, error="boom"
                        )
                    made += 1
                    if event.index in untold:
                        untold.remove(event.index)
                        event = replace(event, cache=report)
                    self.pool.extend(number, event.index, event.token_ids)
                    if event.finish_reason is not None:
                        choices.remove(choice)
                        reason = str(event.finish_reason)
                        self._finished[reason] = self._finished.get(reason, 0) + 1
                    yield event
        finally:
            self._forget(request_id)

    @staticmethod
    async def _until(*events: asyncio.Event) -> None:
        """Until one of them is set."""
        if any(event.is_set() for event in events):
            return
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _choice(
        self, prompt_ids: Sequence[int], params: SamplingParams, index: int, report: CacheReport
    ) -> Iterator[TokenEvent]:
        """The events of one choice, in order; the last has the finish reason."""
        if params.pooling is not None:
            yield _embedding(prompt_ids, params.pooling, report)
            return
        text = self.script(prompt_ids, params, index)
        stop = next((found for found in params.stop if found in text), None)
        raw = text[: text.index(stop)].encode() if stop is not None else text.encode()
        limit = self._info.max_model_len if params.max_tokens is None else params.max_tokens
        reason = FinishReason.STOP if len(raw) <= limit else FinishReason.LENGTH
        raw = raw[:limit]
        if stop is None and params.ignore_eos and len(raw) < limit < self._info.max_model_len:
            raw, reason = (raw + b"." * limit)[:limit], FinishReason.LENGTH
        prompt = _prompt_logprobs(prompt_ids, params)
        held = b""
        pieces = [
            raw[at : at + self.tokens_per_event] for at in range(0, len(raw), self.tokens_per_event)
        ] or [b""]
        for position, piece in enumerate(pieces):
            held += piece
            last = position == len(pieces) - 1
            text = _decodable(held) if not last else held.decode("utf-8", "replace")
            held = held[len(text.encode()) :]
            yield TokenEvent(
                index,
                text,
                tuple(piece),
                tuple(_logprob(token_id, params) for token_id in piece)
                if params.logprobs is not None
                else (),
                finish_reason=reason if last else None,
                stop_reason=stop if last else None,
                cached_tokens=report.reused_tokens,
                prompt_logprobs=prompt if position == 0 else None,
            )

    def abort(self, request_id: str) -> None:
        if request_id in self._live:
            self.aborted.append(request_id)
            self._live[request_id].set()
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._live.pop(request_id, None)
        number = self._numbers.pop(request_id, None)
        if number is not None:
            self.pool.release(number)
        if not self._live:
            self._idle.set()

    def snapshot(self) -> EngineSnapshot:
        return replace(
            self.pool.snapshot(),
            steps=3,
            running=len(self._live),
            prompt_tokens=sum(len(ids) for _, ids, _ in self.submitted),
            requests_finished=dict(self._finished),
        )

    async def probe_cache(self, prompt_ids: Sequence[int], scope: CacheScope = DEFAULT_SCOPE) -> CacheReport:
        self._check_alive()
        self.probed.append((list(prompt_ids), scope))
        return self.report or self.pool.probe(prompt_ids, scope)

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Lets everything pass but regular expressions that do not compile."""
        self._check_alive()
        self.compiled.append(grammar)
        if grammar.kind is GrammarKind.REGEX:
            try:
                re.compile(grammar.text)
            except re.error:
                raise InvalidRequest("The grammar cannot be compiled: it is no regex.", "grammar") from None

    async def cache_page(self, first_block: int = 1, limit: int = 1000, state: str = "") -> CachePage:
        self._check_alive()
        return self.pool.page(first_block, limit, state)

    async def cache_block(self, block_id: int) -> BlockDetail | None:
        self._check_alive()
        return self.pool.detail(block_id)

    async def reset_cache(self) -> int:
        self._check_alive()
        return self.pool.reset()

    def _check_alive(self) -> None:
        if self.sickness is not None or self.stopped:
            raise EngineDead(self.sickness or "stopped")

    async def watch_pool(self) -> AsyncIterator[PoolFrame]:
        viewer = self.pool.watch()
        self.watchers += 1
        sequence = 0
        try:
            while self.sickness is None and not self.stopped:
                frame = self.pool.frame(viewer, sequence, self.pool.lanes())
                if frame is not None:
                    yield frame
                    sequence += 1
                await asyncio.sleep(self.frame_s)
        finally:
            self.watchers -= 1
            self.pool.unwatch(viewer)

    def public_id(self, number: str) -> str:
        return next((name for name, known in self._numbers.items() if str(known) == number), "")

    def health(self) -> str | None:
        return self.sickness

    def start_draining(self) -> None:
        self._draining = True

    async def drained(self) -> None:
        await self._idle.wait()

    async def stop(self) -> None:
        self.stopped = True
        self.gate.set()
        await asyncio.sleep(0)


def _decodable(raw: bytes) -> str:
    """As much as is whole characters."""
    match = re.match(
        rb"(?:[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})*", raw
    )
    return raw[: match.end() if match else 0].decode()


def _logprob(token_id: int, params: SamplingParams, count: int | None = None) -> TokenLogprob:
    number = params.logprobs if count is None else count
    top = tuple(((token_id + step) % 256, -0.5 - step) for step in range(number or 0))
    return TokenLogprob(token_id, -0.5, top)


def _prompt_logprobs(
    prompt_ids: Sequence[int], params: SamplingParams
) -> tuple[TokenLogprob | None, ...] | None:
    if params.prompt_logprobs is None:
        return None
    return (None, *(_logprob(token_id, params, params.prompt_logprobs) for token_id in prompt_ids[1:]))


def _reads_prefix(params: SamplingParams) -> bool:
    pools_all = params.pooling is not None and params.pooling.needs_every_token
    return params.prompt_logprobs is None and not pools_all


def embedding_of(prompt_ids: Sequence[int], dimensions: int | None = None) -> list[float]:
    """A vector of length 1 that depends on the prompt."""
    digest = hashlib.sha256(repr(tuple(prompt_ids)).encode()).digest()
    cut = [byte - 128 for byte in digest[: dimensions or EMBEDDING_SIZE]]
    length = math.hypot(*cut)
    return [value / length for value in cut]


def _embedding(prompt_ids: Sequence[int], pooling: Pooling, report: CacheReport) -> TokenEvent:
    vector = embedding_of(prompt_ids, pooling.dimensions)
    data = struct.pack(f"<{len(vector)}f", *vector)
    return TokenEvent(
        0, "", (), finish_reason=FinishReason.STOP, cached_tokens=report.reused_tokens, embedding=data
    )


class BrokenClient(FakeClient):
    """An engine that cannot start."""

    def __init__(self) -> None:
        super().__init__()
        self.start_error = ConfigError(
            "The model needs 14 GiB and the machine has 8 GiB; use --dtype bfloat16."
        )
