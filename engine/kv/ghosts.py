"""What the cache had: the contents nobody uses, idle ones and evicted ones, in the order of their last use.

It answers two questions: was this evicted, when and why; and which sizes of pool would still have it. It
knows digests and an order, not blocks or tokens, and nothing depends on it: two digests that look alike to
it (one in 2**64) make a figure wrong, never a text.

    last used                                                                              longest ago
    |--- zone 0 ---|0|--- zone 1 ---|1|--- zone 2 ---|2|--- zone 3 ---|3|--- zone 4 ---|4|--- zone 5 ---|
     pools of half   that of the size   those of twice
     the size have   it has: idle       the size ...
     it, larger too

The order is one ring of linked slots, and the marks between the zones (|k|) are slots in it. A pool of
`sizes[k]` blocks has what is before mark k. It does what a real pool does: a release brings a content to the
front, a use takes it out, and when blocks are taken so that contents and blocks in use do not fit any more,
its mark moves over the contents that were used longest ago. A content crosses each mark once at most, so all
of this is O(1), and the pools of all sizes are followed exactly, not estimated from a distance.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from engine.views import WHATIF_SIZES, EvictionCause

POOLS_REMEMBERED = 8  # as many pools' worth of contents, ...
MAX_ENTRIES = 1 << 20  # ... no more than this, ...
POOLS_AT_LEAST = 2  # ... but never so few that idle ones must be forgotten
TICKS_PER_S = 10

_RING = 0  # the slot that closes the ring: the last used is after it, the oldest before it
_CAUSES = (None, *EvictionCause)  # of an idle one, None
_CAUSE_OF = {cause: index for index, cause in enumerate(_CAUSES)}
_ZONE_BITS = 4
_ZONE = (1 << _ZONE_BITS) - 1


class Ghosts:
    """A list in order of last use with a mark for each size of pool.

    Args:
        num_blocks: of the pool as it is.
        limit: most entries; the oldest are dropped.
    """

    def __init__(self, num_blocks: int, limit: int | None = None) -> None:
        if limit is None:
            limit = max(min(POOLS_REMEMBERED * num_blocks, MAX_ENTRIES), POOLS_AT_LEAST * num_blocks)
        self.limit = max(limit, 1)
        self.nowhere = len(WHATIF_SIZES)
        self.overflowed = False
        self._pools = tuple(int(size * num_blocks) for size in WHATIF_SIZES)
        self._in_zone = [0] * (self.nowhere + 1)
        self._len = 0
        marks = self.nowhere + 1  # slots of the ring's end and of the marks; mark k is slot k + 1
        self._first = marks
        self._keys = array("q", bytes(8 * marks))
        self._older = array("I", [*range(1, marks), _RING])
        self._newer = array("I", [marks - 1, *range(marks - 1)])
        self._lost_at = array("I", bytes(4 * marks))  # in ticks
        self._state = bytearray(marks)  # zone and cause
        self._free = _RING  # a chain through _older
        self._table = array("I", bytes(4 << (2 * self.limit - 1).bit_length()))  # hash table of slots
        self._mask = len(self._table) - 1

    def __len__(self) -> int:
        return self._len

    # ---- what happens to contents

    def released(self, digests: Iterable[bytes]) -> None:
        """Nobody uses the contents any more; they are kept, the last one for longest."""
        for key in map(hash, digests):
            slot = self._find(key)
            if slot:
                self._unlink(slot)
            else:
                slot = self._new(key)
            self._link(slot, _RING)
            self._state[slot] = 0
            self._in_zone[0] += 1

    def used(self, digests: Iterable[bytes]) -> None:
        """Somebody uses the contents, or has computed them again."""
        table, mask = self._table, self._mask
        for key in map(hash, digests):
            if table[key & mask] and (slot := self._find(key)):  # mostly nothing is there
                self._unlink(slot)
                self._delete(slot)

    def lost(self, digest: bytes, now_s: float, cause: EvictionCause) -> None:
        """The content was given up, idle or from under its last user's hands."""
        key = hash(digest)
        slot = self._find(key)
        if slot:
            self._state[slot] = (self._state[slot] & _ZONE) | _CAUSE_OF[cause] << _ZONE_BITS
        else:  # larger pools would have given it up too
            slot = self._new(key)
            self._link(slot, self.nowhere)
            self._state[slot] = self.nowhere | _CAUSE_OF[cause] << _ZONE_BITS
            self._in_zone[self.nowhere] += 1
        self._lost_at[slot] = int(now_s * TICKS_PER_S)

    def taken(self, in_use: int) -> None:
        """Blocks were taken: each pool gives up what does not fit beside `in_use` blocks."""
        kept = in_use
        for zone, pool in enumerate(self._pools):
            kept += self._in_zone[zone]
            if kept > pool:
                kept -= self._move_mark(zone, kept - pool)

    def emptied(self) -> None:
        """Pools of every size were emptied. Those that were idle have been reported `lost` before."""
        newer, older, last = self._newer, self._older, self.nowhere
        for mark in range(1, last + 1):
            newer[older[mark]], older[newer[mark]] = newer[mark], older[mark]
        front = older[_RING]
        for mark in range(1, last + 1):
            older[mark - 1], newer[mark] = mark, mark - 1
        older[last], newer[front] = front, last
        self._state = self._state.translate(bytes((state & ~_ZONE) | last for state in range(256)))
        self._in_zone = [*([0] * last), self._len]

    # ---- asking

    def zones(self, digests: Iterable[bytes]) -> Iterator[int]:
        """Of each content the index of the smallest size that has it, `nowhere` where none has; -1: not
        listed."""
        table, keys, state, mask = self._table, self._keys, self._state, self._mask
        for key in map(hash, digests):
            at = key & mask
            while (slot := table[at]) and keys[slot] != key:
                at = (at + 1) & mask
            yield state[slot] & _ZONE if slot else -1

    def recall(self, digest: bytes) -> tuple[float, EvictionCause] | None:
        """When and why the content was evicted, if it is remembered."""
        slot = self._find(hash(digest))
        cause = _CAUSES[self._state[slot] >> _ZONE_BITS] if slot else None
        return None if cause is None else (self._lost_at[slot] / TICKS_PER_S, cause)

    # ---- the ring

    def _link(self, slot: int, after: int) -> None:
        """Puts a slot into the ring, next older than `after`."""
        next_older = self._older[after]
        self._older[after] = self._newer[next_older] = slot
        self._newer[slot], self._older[slot] = after, next_older

    def _unlink(self, slot: int) -> None:
        newer, older = self._newer[slot], self._older[slot]
        self._older[newer], self._newer[older] = older, newer
        self._in_zone[self._state[slot] & _ZONE] -= 1

    def _move_mark(self, zone: int, excess: int) -> int:
        """Moves the oldest of a zone, `excess` at most, into the next one; returns how many."""
        newer, older, state = self._newer, self._older, self._state
        moved = min(excess, self._in_zone[zone])
        mark = at = zone + 1
        for _ in range(moved):
            at = newer[at]
            state[at] += 1
        if moved:
            newer[older[mark]], older[newer[mark]] = newer[mark], older[mark]
            before = newer[at]
            newer[mark], older[mark] = before, at
            older[before] = newer[at] = mark
            self._in_zone[zone] -= moved
            self._in_zone[zone + 1] += moved
        return moved

    # ---- slots and the table that finds them: open addressing, at most half full

    def _new(self, key: int) -> int:
        if self._len >= self.limit:
            self._drop_oldest()
        slot = self._free
        if slot:
            self._free = self._older[slot]
            self._keys[slot] = key
        else:
            slot = len(self._keys)
            self._keys.append(key)
            for column in (self._older, self._newer, self._lost_at):
                column.append(0)
            self._state.append(0)
        table, mask = self._table, self._mask
        at = key & mask
        while table[at]:
            at = (at + 1) & mask
        table[at] = slot
        self._len += 1
        return slot

    def _drop_oldest(self) -> None:
        self.overflowed = True
        slot = self._newer[_RING]
        while slot < self._first:
            slot = self._newer[slot]
        self._unlink(slot)
        self._delete(slot)

    def _find(self, key: int) -> int:
        table, keys, mask = self._table, self._keys, self._mask
        at = key & mask
        while slot := table[at]:
            if keys[slot] == key:
                return slot
            at = (at + 1) & mask
        return 0

    def _delete(self, slot: int) -> None:
        """Frees a slot, and closes the gap that it leaves in the table."""
        table, keys, mask = self._table, self._keys, self._mask
        gap = keys[slot] & mask
        while table[gap] != slot:
            gap = (gap + 1) & mask
        at = (gap + 1) & mask
        while follower := table[at]:
            if (at - keys[follower]) & mask >= (at - gap) & mask:
                table[gap], gap = follower, at
            at = (at + 1) & mask
        table[gap] = 0
        self._older[slot], self._free = self._free, slot
        self._len -= 1
