"""The blocks: who counts references on them, and which is handed out next. It knows no tokens.

Each change of a block's state is told to `facts`, which remembers whose blocks they are and since when.

Every block but the padding block 0 is in exactly one of three states:

            take                     drop to 0, content kept
    free ----------> in use (ref > 0) ----------------------> idle (least recently used first)
     ^                 |      ^                                 |        |
     |                 |      +------------- share -------------+        |
     +-- drop to 0 ----+                                                 |
     +------------------------- forget, or evicted by take --------------+
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

from engine.kv.facts import BlockFacts

PADDING_BLOCK = 0


class BlockPool:
    """Reference counts, a free list and an LRU order of idle blocks; every operation is O(1) a block.

    Args:
        num_blocks: the padding block included.
        on_evict: told of each idle block whose content is given up to make room.

    Attributes:
        facts: about each block; read by those who show the pool.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks - 1
        self.num_shared = 0
        self._on_evict = on_evict
        self._refs = array("I", bytes(4 * num_blocks))
        self._kept = bytearray(num_blocks)  # 1: has content worth keeping at ref 0
        self._free = list(range(num_blocks - 1, PADDING_BLOCK, -1))  # a stack: low ids come first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.facts = BlockFacts(self._refs, self._kept)

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Blocks nobody uses whose content is kept."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Blocks `take` can hand out."""
        return len(self._free) + len(self._idle)

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - len(self._free) - len(self._idle)

    def ref(self, block_id: int) -> int:
        return self._refs[block_id]

    def count_idle(self, block_ids: Iterable[int]) -> int:
        return sum(map(self._idle.__contains__, block_ids))

    def is_kept(self, block_id: int) -> bool:
        return bool(self._kept[block_id])

    def take(self, count: int, owner: int = 0, tenant: int = 0, position: int = 0) -> list[int]:
        """Hands out `count` blocks with one reference each: free ones first, then the oldest idle ones.

        The caller asked `num_available` before.

        Args:
            owner, tenant, position: of the first, for `facts`.
        """
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block_id in taken:
            self._refs[block_id] = 1
        self.facts.took(taken, owner, tenant, position)
        return taken

    def share(self, block_ids: Sequence[int]) -> list[int]:
        """Adds a reference to each block, in use or idle; returns those that were idle."""
        refs, idle = self._refs, self._idle
        woken = []
        for block_id in block_ids:
            count = refs[block_id]
            if count == 0:
                del idle[block_id]  # KeyError: a free block has nothing to share
                woken.append(block_id)
            elif count == 1:
                self.num_shared += 1
            refs[block_id] = count + 1
        self.facts.reawoke(woken)
        self.facts.mark(block_ids)
        return woken

    def drop(self, block_ids: Sequence[int]) -> list[int]:
        """Takes a reference of each away; the last one makes a block idle or free. Returns those now idle."""
        refs, kept, idle = self._refs, self._kept, self._idle
        idled, freed = [], []
        for block_id in block_ids:
            count = refs[block_id] - 1
            if count < 0:
                raise AssertionError(f"block {block_id} released more often than taken")
            refs[block_id] = count
            if count == 1:
                self.num_shared -= 1
            elif count == 0 and kept[block_id]:
                idle[block_id] = None
                idled.append(block_id)
            elif count == 0:
                freed.append(block_id)
        self._free += freed
        self.facts.idled(idled)
        self.facts.freed(freed, self.facts.in_use)
        self.facts.mark(block_ids)
        return idled

    def keep(self, block_ids: Sequence[int]) -> None:
        """From now on the blocks' content is worth keeping when their last reference goes."""
        for block_id in block_ids:
            self._kept[block_id] = 1
        self.facts.mark(block_ids)

    def forget(self, block_id: int) -> None:
        """Undoes `keep`; an idle block becomes free."""
        self._kept[block_id] = 0
        self.facts.follows(block_id, 0)
        if block_id in self._idle:
            del self._idle[block_id]
            self._free.append(block_id)
            self.facts.freed([block_id], self.facts.cached)

    def idle_ids(self) -> Iterator[int]:
        """Idle blocks, the next to be evicted first."""
        return iter(self._idle)

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        self._kept[block_id] = 0
        self._on_evict(block_id)
        self.facts.evicted(block_id)
        return block_id
