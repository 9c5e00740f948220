"""A request as the scheduler sees it: token ids and a few counts. It knows no text and no tensors.

                      admit                    prompt computed
    WAITING ----------------------> RUNNING ------------------> RUNNING (decoding)
       ^                              |  |
       |          preempt             |  |  stop, length, abort, error
       +------------------------------+  +-------------------------------> FINISHED

One rule instead of two phases: each step gives tokens until `computed == known`.

    0        cached      confirmed     computed            len(token_ids)     known
    |----------|-------------|------------|---------------------|---------------|
     prefix hit  seen and     given to      still to compute     sampled, not yet seen (in flight)
                 finite       steps in
                              flight
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto, unique

from engine.grammar import Matcher
from engine.types import SamplingParams, TokenLogprob
from engine.views import DEFAULT_SCOPE, CacheReport, CacheScope

UNLIMITED = 2**31


@unique
class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True)
class Account:
    """What one tenant's requests came to; all of them hold it. `live`: choices that have not ended."""

    live: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    generated_tokens: int = 0


class BlockKey:
    """The content of one full block and, through `parent`, of everything before it.

    Two keys mean the same tokens if and only if their bytes and their parents' are equal; the digest only
    makes that quick to find. Made by the prefix cache, kept by requests so that a block is hashed once.

    Attributes:
        digest: hash over (parent's digest, content).
        content: the token ids, 4 bytes each; in a chain's first block the salt goes in front.
        parent: the block before, None for the first.
    """

    __slots__ = ("content", "digest", "parent")

    def __init__(self, digest: bytes, content: bytes, parent: BlockKey | None) -> None:
        self.digest = digest
        self.content = content
        self.parent = parent


class Request:
    """One choice of one submitted request. Owned by the scheduler; nothing else changes it.

    Attributes:
        token_ids: prompt, then every token sampled and seen.
        computed: tokens whose keys and values are in blocks, or will be once the steps in flight end.
        confirmed: tokens computed by steps whose sampled token was seen and finite; these may be published.
        in_flight: tokens sampled by a step whose result has not been seen.
        max_output: tokens it may generate; `compute_limit` is what that makes it compute (the last
            sampled token's keys and values are never needed).
        stop_ids: tokens that end it, the model's own end of turn included.
        order: (priority, arrival): the smaller is admitted earlier, and preempted later.
        row: the executor's row, from admission on, else -1. `started` once the executor was told.
        adopting: admitted, and not all blocks of its prefix hit are its own yet; nothing is computed before.
        followers: on the first choice, the others that wait for its prompt to be computed.
        prompt_logprobs: collected by the choice that computes the prompt, None once handed over.
        embedding: of the prompt, once it is there.
        preemptions: also its epoch: results of steps planned in an earlier epoch are dropped.
        lost_tokens: what the last preemption took from it.
        scope: on whose account its blocks are, and with whom they are shared.
        account: its tenant's, from its arrival at the scheduler on.
        number: its id as an unsigned 32-bit number, for columns of numbers; 0 where the id is none.
        matcher: where it is in its grammar, as far as tokens were seen; None where it has none.
        explain: its caller wants to know what was reused. `report` says it, until it is handed over.
        arrival_s, admitted_s, first_token_s: by the engine's clock. Only the choice that was in the queue
            is ever admitted; first_token_s is each choice's own.

    The KVManager's, kept here because they live as long:
        block_ids: the page table.
        block_keys: keys of the leading full blocks, as far as they were needed.
        num_published: leading blocks that need no publishing (again).
        copy_source: a shared tail block to copy before the first write; a reference is held on it.
    """

    __slots__ = (
        "account", "admitted_s", "adopting", "arrival_s", "block_ids", "block_keys", "cached_tokens",
        "compute_limit", "computed", "confirmed", "copy_source", "embedding", "explain", "first_token_s",
        "followers", "in_flight", "index", "lost_tokens", "matcher", "max_output", "num_published", "number",
        "order", "params", "preemptions", "prompt_len", "prompt_logprobs", "report", "request_id", "row",
        "scope", "seed", "started", "status", "stop_ids", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        index: int = 0,
        seed: int = 0,
        scope: CacheScope = DEFAULT_SCOPE,
        explain: bool = False,
        matcher: Matcher | None = None,
    ) -> None:
        self.request_id = request_id
        self.number = _number(request_id)
        self.index = index
        self.params = params
        self.seed = seed
        self.scope = scope
        self.explain = explain
        self.matcher = matcher
        self.report: CacheReport | None = None
        self.token_ids: list[int] = list(prompt_ids)
        self.prompt_len = len(self.token_ids)
        self.status = Status.WAITING
        self.order = (params.priority, 0)
        self.computed = 0
        self.confirmed = 0
        self.in_flight = 0
        self.cached_tokens = 0
        self.set_limits(UNLIMITED if params.max_tokens is None else params.max_tokens)
        self.block_ids: list[int] = []
        self.block_keys: list[BlockKey] = []
        self.num_published = 0
        self.copy_source: int | None = None
        self.row = -1
        self.started = False
        self.adopting = False
        self.followers: list[Request] = []
        collects = params.prompt_logprobs is not None and index == 0
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if collects else None
        self.embedding: bytes | None = None
        self.preemptions = 0
        self.lost_tokens = 0
        self.account: Account
        self.arrival_s = 0.0
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None

    def set_limits(self, max_output: int, stop_ids: frozenset[int] = frozenset()) -> None:
        """Sets what ends this choice. The scheduler's, when the request is added."""
        self.max_output = max_output
        self.compute_limit = self.prompt_len + max(max_output - 1, 0)
        self.stop_ids = stop_ids

    @property
    def only_prompt(self) -> bool:
        """Whether its prompt is computed for itself, though nothing follows it."""
        return self.max_output == 0 and (self.prompt_logprobs is not None or self.params.pooling is not None)

    @property
    def salt(self) -> bytes:
        """Only requests of the same salt share blocks."""
        return self.scope.salt

    @property
    def known(self) -> int:
        """Tokens that exist, seen or still in flight."""
        return len(self.token_ids) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens still to be computed."""
        known = len(self.token_ids) + self.in_flight
        return (known if known < self.compute_limit else self.compute_limit) - self.computed

    @property
    def num_output(self) -> int:
        """Tokens generated and seen."""
        return len(self.token_ids) - self.prompt_len

    def __repr__(self) -> str:
        return (
            f"<{self.request_id}/{self.index} {self.status.name} row {self.row}: "
            f"{self.computed} of {self.known} computed, {self.in_flight} in flight, blocks {self.block_ids}>"
        )


def _number(request_id: str) -> int:
    """The number that a request's id is the decimal form of.

    >>> _number("17"), _number("chat-17")
    (17, 0)
    """
    return int(request_id) & 0xFFFFFFFF if len(request_id) < 20 and request_id.isdecimal() else 0
