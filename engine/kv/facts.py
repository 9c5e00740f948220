"""What is known of each block besides its tokens: whose it is, where it stands, since when.
It decides nothing and knows no requests.

Columns of plain numbers, a few writes per change of a block's state: all of the pool is shown by copying
them, and what changed since the last look by a set of block ids, which is kept only while somebody looks.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from engine.stats import BUCKETS, Histogram
from engine.views import Lane, PoolFrame


class BlockFacts:
    """The columns, and what is counted by tenant. Written by the BlockPool; the KVManager says what follows
    what, and what time it is.

    A free block's row is zero, and so is the padding block's.

    Args:
        refs, kept: the pool's own columns.

    Attributes:
        now_ds: the engine's clock in tenths of a second since it started.
        owners: the number of the request that took the block. tenants: on whose account, an index into
            `tenant_names`, of which the first is nobody. positions: its place in page tables.
        parents: the published block with the tokens before; 0 for a chain's first, or where that is gone.
        taken_ds: when it was taken. idle_ds: since when nobody uses it.
        in_use, cached: blocks of each tenant. A block stays its taker's until it is empty.
        allocated, reused: blocks handed out; idle blocks taken into use again.
        dirty: blocks whose row changed since the last frame; None while nobody looks.
    """

    def __init__(self, refs: array[int], kept: bytearray) -> None:
        self.refs, self.kept = refs, kept
        self.owners, self.tenants, self.positions = _zeros(refs), _zeros(refs), _zeros(refs)
        self.taken_ds, self.idle_ds, self.parents = _zeros(refs), _zeros(refs), _zeros(refs)
        self.now_ds = 0
        self.tenant_names: list[str] = []
        self.in_use: list[int] = []
        self.cached: list[int] = []
        self.allocated = 0
        self.reused = 0
        self.age_s = Histogram(BUCKETS["block_age_s"])
        self.idle_s = Histogram(BUCKETS["block_idle_s"])
        self.reuse_gap_s = Histogram(BUCKETS["block_reuse_gap_s"])
        self.dirty: set[int] | None = None
        self._tenant_index: dict[str, int] = {}
        self._frames = 0
        self.tenant("")  # nobody: what a free block shows

    def tenant(self, name: str) -> int:
        """The tenant's index in `tenant_names`, `in_use` and `cached`."""
        index = self._tenant_index.get(name)
        if index is None:
            index = self._tenant_index[name] = len(self.tenant_names)
            self.tenant_names.append(name)
            self.in_use.append(0)
            self.cached.append(0)
        return index

    # ---- what happens to blocks

    def took(self, block_ids: list[int], owner: int, tenant: int, position: int) -> None:
        """Free or evicted blocks are in use now, the first of them at `position` of a page table."""
        for place, block_id in enumerate(block_ids, position):
            self.owners[block_id] = owner
            self.tenants[block_id] = tenant
            self.positions[block_id] = place
            self.taken_ds[block_id] = self.now_ds
        self.in_use[tenant] += len(block_ids)
        self.allocated += len(block_ids)
        self.mark(block_ids)

    def idled(self, block_ids: Sequence[int]) -> None:
        self._count(block_ids, self.in_use, self.cached)
        for block_id in block_ids:
            self.idle_ds[block_id] = self.now_ds

    def reawoke(self, block_ids: Sequence[int]) -> None:
        """Idle blocks are in use again."""
        self._count(block_ids, self.cached, self.in_use)
        self.reused += len(block_ids)
        for idle_ds, times in Counter(map(self.idle_ds.__getitem__, block_ids)).items():
            self.reuse_gap_s.observe((self.now_ds - idle_ds) / 10, times)
        for block_id in block_ids:
            self.idle_ds[block_id] = 0

    def evicted(self, block_id: int) -> None:
        """An idle block lost its content because it is needed; `took` follows."""
        self.cached[self.tenants[block_id]] -= 1
        self.age_s.observe((self.now_ds - self.taken_ds[block_id]) / 10)
        self.idle_s.observe((self.now_ds - self.idle_ds[block_id]) / 10)
        self.idle_ds[block_id] = 0
        self.parents[block_id] = 0

    def freed(self, block_ids: Sequence[int], counts: list[int]) -> None:
        """Blocks are free; `counts` is `in_use` or `cached`, where they were counted so far."""
        self._count(block_ids, counts, None)
        for column in (self.owners, self.tenants, self.positions, self.taken_ds, self.idle_ds):
            for block_id in block_ids:
                column[block_id] = 0

    def follows(self, block_id: int, parent: int) -> None:
        """The published block with the tokens before it is `parent`, or, 0, none any more."""
        self.parents[block_id] = parent
        self.mark((block_id,))

    def joined(self, block_ids: Sequence[int], parents: Sequence[int]) -> None:
        """Blocks were published, each after its parent, if it has one."""
        for block_id, parent in zip(block_ids, parents, strict=True):
            self.parents[block_id] = parent
        self.mark(block_ids)

    def mark(self, block_ids: Iterable[int]) -> None:
        """Their rows changed, or are about to."""
        if self.dirty is not None:
            self.dirty.update(block_ids)

    def _count(self, block_ids: Sequence[int], where: list[int], to: list[int] | None) -> None:
        """Blocks of each tenant are not counted here any more, but there."""
        for tenant, blocks in Counter(map(self.tenants.__getitem__, block_ids)).items():
            where[tenant] -= blocks
            if to is not None:
                to[tenant] += blocks

    # ---- telling

    def frame(self, full: bool, lanes: tuple[Lane, ...] = (), lanes_left_out: int = 0) -> PoolFrame:
        """All rows, or those that changed since the frame before."""
        ids = [] if full else sorted(self.dirty or ())
        if self.dirty is not None:
            self.dirty.clear()

        def column(values: array[int]) -> bytes:
            return values.tobytes() if full else array("I", [values[i] for i in ids]).tobytes()

        self._frames += 1
        return PoolFrame(
            sequence=self._frames,
            full=full,
            now_ds=self.now_ds,
            tenant_names=tuple(self.tenant_names),
            ids=array("I", ids).tobytes(),
            refs=column(self.refs),
            kept=bytes(self.kept) if full else bytes([self.kept[i] for i in ids]),
            owners=column(self.owners),
            tenants=column(self.tenants),
            positions=column(self.positions),
            parents=column(self.parents),
            taken_ds=column(self.taken_ds),
            idle_ds=column(self.idle_ds),
            lanes=lanes,
            lanes_left_out=lanes_left_out,
        )


def _zeros(like: array[int]) -> array[int]:
    return array("I", bytes(like.itemsize * len(like)))
