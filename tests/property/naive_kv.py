"""What the KV cache must do, written as slowly and plainly as possible: lists, sets and whole prefixes.

Blocks are known by the whole text they end, not by hashes; nothing is counted that can be looked up.
"""

from __future__ import annotations

from engine.kv.manager import KVManager
from engine.request import Request

Prefix = tuple[bytes, tuple[int, ...]]  # (salt, all tokens up to and with the block's last)


class NaiveKV:
    """Predicts hits, room, evictions and the order of idle blocks.

    Args:
        exact: the manager's hash is a good one, so that it must find whatever there is to find.
    """

    def __init__(self, kv: KVManager, *, exact: bool) -> None:
        self.kv = kv
        self.size = kv.block_size
        self.exact = exact
        self.free = set(range(1, kv.pool.num_blocks + 1))
        self.idle: list[int] = []  # next to be evicted first
        self.held: list[int] = []  # one entry per reference
        self.published: dict[Prefix, int] = {}
        self.evictions = 0
        self.memory: dict[tuple[int, int], Prefix] = {}  # (block, offset) -> what was computed there

    def prefix(self, request: Request, tokens: int) -> Prefix:
        return request.salt, tuple(request.token_ids[:tokens])

    def hit_blocks(self, request: Request) -> list[int]:
        """The longest chain of published blocks that leaves a token to compute."""
        found: list[int] = []
        for end in range(self.size, len(request.token_ids), self.size):
            block_id = self.published.get(self.prefix(request, end))
            if block_id is None:
                break
            found.append(block_id)
        return found

    def has_room(self, blocks: int) -> bool:
        return blocks <= len(self.free) + len(self.idle)

    def took(self, block_ids: tuple[int, ...]) -> None:
        """Free blocks go first, then the idle one whose content is oldest."""
        for block_id in block_ids:
            if self.free:
                assert block_id in self.free, f"block {block_id} was taken, free were {self.free}"
                self.free.remove(block_id)
            else:
                oldest = self.idle.pop(0)
                assert block_id == oldest, f"block {block_id} was evicted, {oldest} is older"
                self.unpublish(block_id)
                self.evictions += 1
            self.held.append(block_id)
            for offset in range(self.size):
                self.memory.pop((block_id, offset), None)

    def shared(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            if block_id in self.idle:
                self.idle.remove(block_id)
            else:
                assert block_id in self.held, f"block {block_id} is shared, but nobody has it"
            self.held.append(block_id)

    def dropped(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self.held.remove(block_id)
            if block_id in self.held:
                continue
            if block_id in self.published.values():
                self.idle.append(block_id)
            else:
                self.free.add(block_id)

    def publish(self, request: Request, confirmed_before: int) -> None:
        """Publishes the blocks filled between two confirmations; whoever was first stays."""
        for end in range(self.size, request.confirmed + 1, self.size):
            if end > confirmed_before // self.size * self.size:
                block_id = request.block_ids[end // self.size - 1]
                # A bad hash may refuse what a good one takes; it must never take what a good one refuses.
                if self.exact or self.kv.pool.is_kept(block_id):
                    self.published.setdefault(self.prefix(request, end), block_id)

    def unpublish(self, block_id: int) -> None:
        self.published = {prefix: b for prefix, b in self.published.items() if b != block_id}

    def reset(self) -> None:
        self.published.clear()
        self.free |= set(self.idle)
        self.idle.clear()

    def compute(self, request: Request, start: int, end: int) -> None:
        """Writes what attention would have left behind."""
        for position in range(start, end):
            block_id = request.block_ids[position // self.size]
            self.memory[block_id, position % self.size] = self.prefix(request, position + 1)

    def copy(self, source: int, destination: int) -> None:
        for offset in range(self.size):
            if (source, offset) in self.memory:
                self.memory[destination, offset] = self.memory[source, offset]

    def read_back(self, request: Request) -> None:
        """Each computed token of a started request is where its page table says."""
        for position in range(request.computed):
            block_id = request.block_ids[position // self.size]
            found = self.memory.get((block_id, position % self.size))
            assert found == self.prefix(request, position + 1), f"{request}: position {position} has {found}"

    def compare(self) -> None:
        """The manager's counts are what a recount gives."""
        pool = self.kv.pool
        assert pool.num_free == len(self.free)
        assert list(pool.idle_ids()) == self.idle
        assert pool.num_in_use == len(set(self.held))
        assert pool.num_shared == sum(self.held.count(block_id) > 1 for block_id in set(self.held))
        assert pool.evictions == self.evictions
        assert len(self.kv.prefix) == len(self.published)
