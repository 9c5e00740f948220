"""What the engine tells of its cache when asked: plain data, nothing that does anything.

Standard library only, like `types`, and like it sent between processes. Times are seconds; ages are counted
to the moment of the answer, so that the two clocks need not agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, unique

# Of the pool as it is; the live hit rate is estimated for a pool of each of these sizes.
WHATIF_SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)


@unique
class MissReason(StrEnum):
    """Why the reuse of a prompt ended where it did. Each admitted request has exactly one."""

    PARTIAL_BLOCK = "partial_block"  # what is left is shorter than a block; only full blocks are shared
    LAST_TOKEN = "last_token"  # all of it is cached, but the last token's logits must be computed
    NEVER_SEEN = "never_seen"
    EVICTED = "evicted"
    DIVERGED = "diverged"  # what is cached goes on differently
    OTHER_SALT = "other_salt"  # the caller's own tenant has it under another cache_salt
    IN_PROGRESS = "in_progress"  # another request is computing it at this moment
    PROMPT_LOGPROBS = "prompt_logprobs"  # asked for, so each prompt token is computed
    POOLING = "pooling"  # the embedding is made of each prompt token
    CACHING_OFF = "caching_off"


@unique
class EvictionCause(StrEnum):
    """Why cached content was given up."""

    CAPACITY = "capacity"  # its block was needed
    RESET = "reset"  # somebody emptied the cache
    RECLAIMED = "reclaimed"  # the only request left that could need it took the block over to write into it


@dataclass(frozen=True, slots=True)
class CacheScope:
    """On whose account a request's blocks are, and with whom they are shared.

    Attributes:
        tenant: a name from the server's configuration: there are few.
        salt: only requests of the same salt share blocks.
    """

    tenant: str = "default"
    salt: bytes = b""


DEFAULT_SCOPE = CacheScope()


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What of a prompt was, or would be, reused, and why not more.

    Attributes:
        at_token: the first token that is not reused, as an index into the prompt; where the prompt
            DIVERGED, the first token that differs (in the block that was not reused).
        evicted_s: EVICTED: how long ago.
        eviction_cause: EVICTED: why.
        cached_ids: DIVERGED: the cached tokens from `context_start` on, a few before and after `at_token`.
            Empty where they were computed for another tenant.
        memory_full: NEVER_SEEN: the list of evicted blocks has overflowed, so it may have been evicted
            before all that the list remembers.
    """

    prompt_tokens: int
    reused_tokens: int
    reason: MissReason
    at_token: int
    evicted_s: float | None = None
    eviction_cause: EvictionCause | None = None
    cached_ids: tuple[int, ...] = ()
    context_start: int = 0
    memory_full: bool = False


@dataclass(frozen=True, slots=True)
class BlockView:
    """One block of the pool.

    Attributes:
        state: "free", "in_use", "shared" (in use by several) or "cached" (used by nobody, content kept).
        tenant: on whose account it is; "" where it is free.
        owner: the request that first took it, as the client numbered it; "" where it is free.
        holders: the requests in whose page tables it is, a few of them where they are many.
        position: its index in their page tables: it holds tokens position * block_size and after.
        tokens: how many of its slots hold keys and values.
        digest: of its content and all before it, as 16 hex digits; "" where it is not published.
        parent: the block that holds the tokens before, 0 where there is none.
        age_s: since it was taken. idle_s: since nobody uses it, None while somebody does.
    """

    block_id: int
    state: str
    tenant: str = ""
    owner: str = ""
    holders: tuple[str, ...] = ()
    position: int = 0
    tokens: int = 0
    digest: str = ""
    parent: int = 0
    age_s: float = 0.0
    idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class BlockDetail:
    """One block with its tokens. `children`: the cached blocks that go on from it, the newest first; where
    they are many, not all."""

    block: BlockView
    token_ids: tuple[int, ...] = ()
    children: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CachePage:
    """Some blocks of the pool in the order of their ids. `next_block`: where to go on, None at the end."""

    blocks: tuple[BlockView, ...]
    next_block: int | None = None


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What one tenant has and had. Blocks shared between tenants are on the account of who took them."""

    blocks_in_use: int = 0
    blocks_cached: int = 0
    running: int = 0
    waiting: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class HistogramData:
    """Observations by bucket, the last one without an upper bound. Bounds: engine.stats.BUCKETS."""

    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Lane:
    """One live choice. `phase`: "queued", "prefill", "decode" or "preempted" (queued again)."""

    request_id: str
    index: int
    tenant: str
    phase: str
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    output_tokens: int
    blocks: int
    preemptions: int
    age_s: float
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PoolFrame:
    """The pool for a viewer: all of it, or what changed since the frame before. Columns, not rows.

    Each column is an array of little-endian unsigned 32-bit integers, one for each of `ids`; `kept` has one
    byte each. A block's state follows: refs 0 and not kept is free, 0 and kept is cached, 1 is in use, more
    is shared.

    Attributes:
        full: a viewer forgets all it knew. `ids` is empty then: row i is block i, block 0 (padding) included.
        owners: the number of the request that took the block (request_id is its decimal form), 0: nobody.
        tenants: an index into `tenant_names`.
        parents: the block with the tokens before; 0 for the first of a chain or an unpublished block.
        taken_ds, idle_ds: engine time in tenths of a second; compare with `now_ds`. idle_ds is 0 in use.
    """

    sequence: int
    full: bool
    now_ds: int
    tenant_names: tuple[str, ...]
    ids: bytes
    refs: bytes
    kept: bytes
    owners: bytes
    tenants: bytes
    positions: bytes
    parents: bytes
    taken_ds: bytes
    idle_ds: bytes
    lanes: tuple[Lane, ...] = ()
    lanes_left_out: int = 0
