"""The nouns that everybody shares: what a caller asks, what comes back, what the engine says of itself.

Standard library only. Nothing here knows HTTP, tensors or scheduling.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum, unique
from typing import NamedTuple

from engine.embedding import DEFAULT_FACTS, EmbeddingFacts, Pooling
from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.views import CacheReport, HistogramData, TenantUse

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 16384
MAX_BANNED_SEQUENCES = 256
MAX_BANNED_TOKENS = 32
# Below this a temperature is greedy: the division would only overflow.
MIN_TEMPERATURE = 1e-2


@unique
class FinishReason(StrEnum):
    """Why a choice ended. Every choice ends with exactly one of these."""

    STOP = "stop"  # end-of-turn token, stop token or stop string; or its embedding is there
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the caller went away
    ERROR = "error"  # this request broke; the others go on


@unique
class StepRun(StrEnum):
    """How the engine ran a step, and why not better: `how reason`."""

    GRAPH = "graph decode"  # forward and draw in one launch
    GRAMMAR = "forward_graph grammar"  # drawn apart: some token must fit a grammar
    BIAS = "forward_graph bias"  # logit_bias, min_tokens, allowed or banned tokens
    LOGPROBS = "forward_graph logprobs"  # of the likeliest tokens, not only of the drawn one
    PROMPT = "eager prompt"  # more than one token of some sequence is computed
    UNCAPTURED = "eager uncaptured"  # no graph of this kind and size yet
    OFF = "eager off"  # no graphs: on a CPU, or with --cuda-graphs off

    @property
    def how(self) -> str:
        return self.value.partition(" ")[0]

    @property
    def reason(self) -> str:
        return self.value.partition(" ")[2]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate. Validated once, here, for every route.

    Attributes:
        n: choices generated from one prompt, computed once.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p, min_p: nucleus mass; least probability relative to the most likely token.
        presence_penalty, frequency_penalty: OpenAI's, on generated tokens.
        repetition_penalty: divides the logits of tokens in prompt or output; 1 is off.
        logit_bias: token id -> value added to its logit.
        allowed_token_ids: nothing else is drawn; empty allows all.
        banned_sequences: of tokens: the last of one is not drawn after its others.
        seed: with one, the same text whatever else is in the batch; None draws a fresh seed.
        stop, stop_token_ids: strings and tokens that end a choice.
        max_tokens: most tokens to generate; None is up to the model's context.
        min_tokens: stop tokens and strings are not honoured before this many.
        ignore_eos: do not end at the model's end-of-turn tokens.
        skip_special_tokens: leave the model's special tokens out of the text, except `shown_token_ids`.
        logprobs: None, or how many alternatives to return beside each generated token (0: only its own).
        prompt_logprobs: the same for the prompt's tokens; the prefix cache is not read then.
        priority: requests of a smaller one are admitted earlier and preempted later.
        grammar: what the text must be. Other tokens are not drawn; a choice ends when it is complete.
        pooling: how to make an embedding of the prompt. Nothing is generated then.

    Raises:
        InvalidRequest: naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    shown_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    grammar: Grammar | None = None
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        _in_range("n", self.n, 1, MAX_CHOICES)
        _in_range("temperature", self.temperature, 0.0, 2.0)
        _in_range("top_k", self.top_k, -1, 2**31 - 1)
        _in_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        if self.seed is not None:
            _in_range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _in_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _in_range("priority", self.priority, -(2**31), 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens}).", "min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _in_range(name, value, 0, MAX_LOGPROBS)
        self._check_lists()
        self._check_pooling()

    def _check_pooling(self) -> None:
        if self.pooling is None:
            return
        asked = (self.logprobs, self.prompt_logprobs, self.grammar)
        if self.n != 1 or self.max_tokens != 0 or any(value is not None for value in asked):
            raise InvalidRequest("An embedding comes alone: n is 1 and max_tokens is 0.", "pooling")

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}.", "stop")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequest(
                    f"Each stop string must have 1 to {MAX_STOP_STRING_CHARS} characters.", "stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(f"stop_token_ids: at most {MAX_STOP_TOKEN_IDS}.", "stop_token_ids")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias: at most {MAX_LOGIT_BIAS} entries.", "logit_bias")
        if len(self.allowed_token_ids) > MAX_ALLOWED_TOKEN_IDS:
            raise InvalidRequest(f"allowed_token_ids: at most {MAX_ALLOWED_TOKEN_IDS}.", "allowed_token_ids")
        banned = self.banned_sequences
        if len(banned) > MAX_BANNED_SEQUENCES:
            raise InvalidRequest(f"bad_words: at most {MAX_BANNED_SEQUENCES} sequences.", "bad_words")
        if not all(1 <= len(ids) <= MAX_BANNED_TOKENS for ids in banned):
            raise InvalidRequest(f"bad_words: each must have 1 to {MAX_BANNED_TOKENS} tokens.", "bad_words")
        for bias in self.logit_bias.values():
            _in_range("logit_bias", bias, -100.0, 100.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequest where a token id is not one of the model's."""
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias),
            ("allowed_token_ids", self.allowed_token_ids),
            *(("bad_words", banned) for banned in self.banned_sequences),
        ):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequest(
                        f"{name}: token id {token_id} is not in the vocabulary (0 to {vocab_size - 1}).", name
                    )

    def ending_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end a choice of a model with these ends of turn; not drawn before `min_tokens`."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos_token_ids)

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


def token_array(token_ids: Iterable[int]) -> array[int]:
    """Token ids as 4 bytes each, so that long prompts are quick to copy, compare and send. An array that is
    one already is returned itself.

    Raises:
        TypeError, OverflowError: something in it is not an unsigned 32-bit integer.
    """
    if isinstance(token_ids, array) and token_ids.typecode == "I":
        return token_ids
    # iter: bytes would be taken for 4-byte items; a list is read five times faster than what it iterates.
    return array("I", token_ids if isinstance(token_ids, list) else iter(token_ids))


def _in_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = low < value <= high if open_low else low <= value <= high
    if not (math.isfinite(value) and inside):
        bracket = "(" if open_low else "["
        raise InvalidRequest(f"{name} must be in {bracket}{low}, {high}], got {value}.", name)


class TokenLogprob(NamedTuple):
    """One token's log probability under the model, before temperature, penalties and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class TokenOutput(NamedTuple):
    """What one step says of one choice, in token ids: the engine's side of a TokenEvent.

    `token_id` is None on an end that brings no token (abort, error, max_tokens 0, or an embedding).
    """

    request_id: str
    index: int  # type: ignore[assignment]  # the choice; shadows tuple.index, which nobody calls
    token_id: int | None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token, where it was not the model's own end of turn
    logprob: TokenLogprob | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # once, with the first token
    error: str | None = None
    cache: CacheReport | None = None  # once, with the first token, where it was asked for
    queued_s: float | None = None  # once, with the prompt's first token: from arrival to first admission
    embedding: bytes | None = None  # with the end, where it was asked for; see engine.embedding


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What a caller of `EngineClient.submit` receives: text that is safe to show.

    One event may carry no text (a character still incomplete, a stop string still possible) or the text
    of several tokens. The last event of each choice has a finish_reason.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    error: str | None = None
    cache: CacheReport | None = None  # with a choice's first event, where it was asked for
    queued_s: float | None = None  # from the prompt's arrival in the engine to its first admission
    embedding: bytes | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine decided at start-up. Constant for one engine process.

    Attributes:
        quantization: how weights are held in integers, for people; empty where none are.
        kv_dtype: of keys and values, the model's or "int8".
        largest_request_tokens: prompt + output that the whole KV pool can hold.
        embeddings: what the model says of them.
        reasons: (setting, value, why) for each automatic value, in the order to print.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    backend: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    kv_dtype: str
    weight_bytes: int
    kv_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    prefix_caching: bool
    largest_request_tokens: int
    embeddings: EmbeddingFacts = DEFAULT_FACTS
    reasons: tuple[tuple[str, str, str], ...] = ()
    quantization: str = ""


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's state after a step. Counters only grow within one engine process.

    in_use + cached + free blocks = the pool, always; shared blocks are among those in use.

    Attributes:
        tokens_held: tokens whose keys and values are in blocks in use; the rest of their slots is waste.
        cached_tokens: tokens in cached blocks.
        allocated_blocks: blocks handed out. reused_blocks: cached blocks taken into use by a prefix hit.
        evicted_blocks: by EvictionCause.
        prefix_queries, prefix_hits: requests looked up, and those of which any block was found.
        misses, miss_tokens: by MissReason: requests, and prompt tokens that were not reused.
        whatif_hit_tokens: by size of the pool, relative to what it is ("0.5", "1", ...): the prompt tokens
            that would have been found; of `prefix_query_tokens`.
        ghosts: evicted blocks that are remembered for this.
        step_runs: steps seen, by StepRun.
        busy_s: time spent in steps.
        histograms: by name; see engine.stats.BUCKETS.
        tenants: by name.
    """

    steps: int = 0
    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_in_use: int = 0
    blocks_shared: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    tokens_held: int = 0
    cached_tokens: int = 0
    allocated_blocks: int = 0
    reused_blocks: int = 0
    evicted_blocks: Mapping[str, int] = field(default_factory=dict)
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    misses: Mapping[str, int] = field(default_factory=dict)
    miss_tokens: Mapping[str, int] = field(default_factory=dict)
    whatif_hit_tokens: Mapping[str, int] = field(default_factory=dict)
    ghosts: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    step_runs: Mapping[str, int] = field(default_factory=dict)
    busy_s: float = 0.0
    requests_finished: Mapping[str, int] = field(default_factory=dict)
    histograms: Mapping[str, HistogramData] = field(default_factory=dict)
    tenants: Mapping[str, TenantUse] = field(default_factory=dict)
