"""A paged cache in a few lines, for FakeClient: the rules of sharing and eviction without keys and values.

Slow and simple on purpose: blocks are rows of one list, and what is cached is found by comparing tokens.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.types import EngineSnapshot
from engine.views import (
    BlockDetail,
    BlockView,
    CachePage,
    CacheReport,
    CacheScope,
    EvictionCause,
    Lane,
    MissReason,
    PoolFrame,
    TenantUse,
)

CONTEXT = 8  # tokens told around the place where two prompts part
GHOSTS = 1024

Chain = tuple[bytes, tuple[int, ...]]  # salt, and all tokens up to a block's end


@dataclass(slots=True)
class Block:
    """One row of the pool."""

    tenant: str = ""
    owner: int = 0
    holders: list[int] = field(default_factory=list)
    position: int = 0
    tokens: list[int] = field(default_factory=list)
    chain: Chain | None = None  # where it is published
    parent: int = 0
    taken_s: float = 0.0
    idle_s: float = 0.0

    @property
    def state(self) -> str:
        if self.holders:
            return "shared" if len(self.holders) > 1 else "in_use"
        return "cached" if self.chain is not None else "free"


@dataclass(slots=True)
class _Choice:
    """One choice: its tokens and the blocks that hold them."""

    number: int
    index: int
    scope: CacheScope
    tokens: list[int]
    blocks: list[int]
    prompt_tokens: int
    cached_tokens: int
    began_s: float


class FakePool:
    """The pool of `num_blocks`, block 0 included, which is never handed out.

    Attributes:
        clock: moved on by tests that want to see time pass.
    """

    def __init__(self, num_blocks: int, block_size: int, caching: bool = True) -> None:
        self.block_size = block_size
        self.caching = caching
        self.blocks = [Block() for _ in range(num_blocks)]
        self.clock = time.monotonic
        self.evictions: dict[str, int] = {}
        self.misses: dict[str, int] = {}
        self.sequences: dict[tuple[int, int], _Choice] = {}
        self._published: dict[Chain, int] = {}
        self._ghosts: dict[Chain, tuple[float, EvictionCause]] = {}
        self._frames = 0
        self._dirty: dict[int, set[int]] = {}
        self._query_tokens = self._hit_tokens = self._allocated = 0

    # What requests do.

    def admit(
        self, number: int, index: int, prompt: Sequence[int], scope: CacheScope, reads: bool = True
    ) -> CacheReport:
        """Gives one choice its blocks; says what of them was there already."""
        report = self.probe(prompt, scope)
        if not reads:
            report = CacheReport(len(prompt), 0, MissReason.PROMPT_LOGPROBS, 0)
        if index == 0:
            self.misses[report.reason] = self.misses.get(report.reason, 0) + 1
            self._query_tokens += len(prompt)
            self._hit_tokens += report.reused_tokens
        sequence = _Choice(number, index, scope, [], [], len(prompt), report.reused_tokens, self.clock())
        self.sequences[number, index] = sequence
        for end in range(self.block_size, report.reused_tokens + 1, self.block_size):
            block_id = self._published[scope.salt, tuple(prompt[:end])]
            self.blocks[block_id].holders.append(number)
            self._touch(block_id)
            sequence.blocks.append(block_id)
        sequence.tokens += prompt[: report.reused_tokens]
        self.extend(number, index, prompt[report.reused_tokens :])
        return report

    def extend(self, number: int, index: int, tokens: Sequence[int]) -> None:
        """Writes tokens at the end of a choice."""
        sequence = self.sequences[number, index]
        for token in tokens:
            if len(sequence.tokens) % self.block_size == 0:
                block_id = self._take(sequence)
                if block_id is None:
                    return  # a full pool: a fake does not preempt
            sequence.tokens.append(token)
            block = self.blocks[sequence.blocks[-1]]
            block.tokens.append(token)
            if len(block.tokens) == self.block_size:
                self._publish(sequence)
        if sequence.blocks:
            self._touch(sequence.blocks[-1])

    def release(self, number: int) -> None:
        """Ends a request: its blocks are cached where they are published, else free."""
        for key in [key for key in self.sequences if key[0] == number]:
            for block_id in reversed(self.sequences.pop(key).blocks):
                block = self.blocks[block_id]
                block.holders.remove(number)
                if not block.holders:
                    block.idle_s = self.clock()
                    if block.chain is None:
                        self.blocks[block_id] = Block()
                self._touch(block_id)

    def _take(self, sequence: _Choice) -> int | None:
        block_id = next((i for i, block in enumerate(self.blocks) if i and block.state == "free"), None)
        if block_id is None:
            cached = [i for i, block in enumerate(self.blocks) if block.state == "cached"]
            if not cached:
                return None
            block_id = min(cached, key=lambda i: self.blocks[i].idle_s)
            self._evict(block_id, EvictionCause.CAPACITY)
        parent = sequence.blocks[-1] if sequence.blocks else 0
        self.blocks[block_id] = Block(
            sequence.scope.tenant, sequence.number, [sequence.number], len(sequence.blocks), [], None,
            parent, self.clock(),
        )  # fmt: skip
        sequence.blocks.append(block_id)
        self._allocated += 1
        self._touch(block_id)
        return block_id

    def _publish(self, sequence: _Choice) -> None:
        chain = (sequence.scope.salt, tuple(sequence.tokens))
        if self.caching and chain not in self._published:
            self._published[chain] = sequence.blocks[-1]
            self.blocks[sequence.blocks[-1]].chain = chain
            self._ghosts.pop(chain, None)

    def _evict(self, block_id: int, cause: EvictionCause) -> None:
        chain = self.blocks[block_id].chain
        assert chain is not None
        del self._published[chain]
        self._ghosts[chain] = (self.clock(), cause)
        while len(self._ghosts) > GHOSTS:
            del self._ghosts[next(iter(self._ghosts))]
        self.evictions[cause] = self.evictions.get(cause, 0) + 1
        self.blocks[block_id] = Block()
        self._touch(block_id)

    def reset(self) -> int:
        cached = [i for i, block in enumerate(self.blocks) if block.state == "cached"]
        for block_id in cached:
            self._evict(block_id, EvictionCause.RESET)
        for block in self.blocks:
            if block.chain is not None:
                del self._published[block.chain]
                block.chain = None
        return len(cached)

    # What is told of it.

    def probe(self, prompt: Sequence[int], scope: CacheScope) -> CacheReport:
        if not self.caching:
            return CacheReport(len(prompt), 0, MissReason.CACHING_OFF, 0)
        size, length = self.block_size, len(prompt)
        found = 0
        while found + size <= length and (scope.salt, tuple(prompt[: found + size])) in self._published:
            found += size
        if found == length:
            reused = (length - 1) // size * size
            return CacheReport(length, reused, MissReason.LAST_TOKEN, reused)
        if length - found < size:
            return CacheReport(length, found, MissReason.PARTIAL_BLOCK, found)
        return self._why(prompt, scope, found)

    def _why(self, prompt: Sequence[int], scope: CacheScope, found: int) -> CacheReport:
        wanted = tuple(prompt[: found + self.block_size])
        ghost = self._ghosts.get((scope.salt, wanted))
        if ghost is not None:
            ago = self.clock() - ghost[0]
            return CacheReport(len(prompt), found, MissReason.EVICTED, found, ago, ghost[1])
        others = [block for block in self.blocks if block.chain and block.tenant == scope.tenant]
        if any(block.chain and block.chain[1] == wanted for block in others):
            return CacheReport(len(prompt), found, MissReason.OTHER_SALT, found)
        best = max(
            (
                (_common(block.chain[1][found:], wanted[found:]), block)
                for block in self.blocks
                if block.chain
                and block.chain[0] == scope.salt
                and len(block.chain[1]) == len(wanted)
                and block.chain[1][:found] == wanted[:found]
            ),
            key=lambda pair: pair[0],
            default=None,
        )
        if best is None or not (found or best[0]):
            full = len(self._ghosts) == GHOSTS
            return CacheReport(len(prompt), found, MissReason.NEVER_SEEN, found, memory_full=full)
        at, block = found + best[0], best[1]
        start = max(found, at - CONTEXT)
        theirs: tuple[int, ...] = ()
        if block.tenant == scope.tenant:
            theirs = tuple(block.tokens[start - found : at - found + CONTEXT])
        return CacheReport(
            len(prompt), found, MissReason.DIVERGED, at, cached_ids=theirs, context_start=start
        )

    def page(self, first_block: int, limit: int, state: str) -> CachePage:
        views: list[BlockView] = []
        for block_id in range(max(1, first_block), len(self.blocks)):
            if state in ("", self.blocks[block_id].state):
                if len(views) == limit:
                    return CachePage(tuple(views), block_id)
                views.append(self.view(block_id))
        return CachePage(tuple(views))

    def view(self, block_id: int) -> BlockView:
        block, now = self.blocks[block_id], self.clock()
        if block.state == "free":
            return BlockView(block_id, "free")
        digest = f"{hash(block.chain) & (2**64 - 1):016x}" if block.chain else ""
        return BlockView(
            block_id,
            block.state,
            block.tenant,
            str(block.owner),
            tuple(map(str, dict.fromkeys(block.holders))),
            block.position,
            len(block.tokens),
            digest,
            block.parent if block.chain else 0,
            now - block.taken_s,
            None if block.holders else now - block.idle_s,
        )

    def detail(self, block_id: int) -> BlockDetail | None:
        if not 0 < block_id < len(self.blocks):
            return None
        children = tuple(
            i for i, block in enumerate(self.blocks) if block.chain is not None and block.parent == block_id
        )
        return BlockDetail(self.view(block_id), tuple(self.blocks[block_id].tokens), children)

    def snapshot(self) -> EngineSnapshot:
        states = [block.state for block in self.blocks[1:]]
        tenants = sorted({block.tenant for block in self.blocks if block.tenant})
        return EngineSnapshot(
            blocks_total=len(states),
            blocks_in_use=states.count("in_use") + states.count("shared"),
            blocks_shared=states.count("shared"),
            blocks_cached=states.count("cached"),
            blocks_free=states.count("free"),
            tokens_held=sum(len(block.tokens) for block in self.blocks if block.holders),
            cached_tokens=sum(len(block.tokens) for block in self.blocks if block.state == "cached"),
            allocated_blocks=self._allocated,
            evicted_blocks=dict(self.evictions),
            prefix_queries=sum(self.misses.values()),
            prefix_query_tokens=self._query_tokens,
            prefix_hit_tokens=self._hit_tokens,
            misses=dict(self.misses),
            ghosts=len(self._ghosts),
            tenants={
                name: TenantUse(
                    blocks_in_use=sum(bool(b.holders) for b in self.blocks if b.tenant == name),
                    blocks_cached=sum(b.state == "cached" for b in self.blocks if b.tenant == name),
                )
                for name in tenants
            },
        )

    # What a viewer gets.

    def watch(self) -> int:
        """Begins to note changes for a new viewer; everything has changed at first."""
        self._frames += 1
        self._dirty[self._frames] = set(range(len(self.blocks)))
        return self._frames

    def unwatch(self, viewer: int) -> None:
        self._dirty.pop(viewer, None)

    def _touch(self, block_id: int) -> None:
        for dirty in self._dirty.values():
            dirty.add(block_id)

    def frame(self, viewer: int, sequence: int, lanes: Sequence[Lane] = ()) -> PoolFrame | None:
        """The first frame is full; None where nothing has changed since the last."""
        full = sequence == 0
        ids = sorted(self._dirty[viewer])
        if not ids and not full:
            return None
        self._dirty[viewer].clear()
        names = sorted({block.tenant for block in self.blocks} | {""})
        rows = [self.blocks[i] for i in ids]
        return PoolFrame(
            sequence=sequence,
            full=full,
            now_ds=round(self.clock() * 10),
            tenant_names=tuple(names),
            ids=b"" if full else _column(ids),
            refs=_column([len(block.holders) for block in rows]),
            kept=bytes(block.chain is not None for block in rows),
            owners=_column([block.owner for block in rows]),
            tenants=_column([names.index(block.tenant) for block in rows]),
            positions=_column([block.position for block in rows]),
            parents=_column([block.parent if block.chain else 0 for block in rows]),
            taken_ds=_column([round(block.taken_s * 10) for block in rows]),
            idle_ds=_column([0 if block.holders else round(block.idle_s * 10) for block in rows]),
            lanes=tuple(lanes),
        )

    def lanes(self) -> list[Lane]:
        now = self.clock()
        return [
            Lane(
                str(s.number),
                s.index,
                s.scope.tenant,
                "decode",
                s.prompt_tokens,
                s.cached_tokens,
                len(s.tokens),
                max(0, len(s.tokens) - s.prompt_tokens),
                len(s.blocks),
                0,
                now - s.began_s,
            )
            for s in self.sequences.values()
        ]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(right))


def _column(values: Sequence[int]) -> bytes:
    numbers = array("I", values)
    assert numbers.itemsize == 4
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
