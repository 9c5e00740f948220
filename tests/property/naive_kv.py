"""What the KV cache must do and say, written as slowly and plainly as possible: lists, sets, whole prefixes.

Blocks are known by the whole text they end, not by hashes; nothing is counted that can be looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.kv.manager import KVManager
from engine.request import Request, Status
from engine.views import CacheReport, CacheScope, EvictionCause, MissReason

Prefix = tuple[bytes, tuple[int, ...]]  # (salt, all tokens up to and with the block's last)


class Loss(NamedTuple):
    """When and why a content was given up; `use`: the number of its last use, None where it was in use."""

    when_s: float
    cause: EvictionCause
    use: int | None


class NaiveKV:
    """Predicts hits, room, evictions, the order of idle blocks, and what is said of a miss.

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
        self.tenants: dict[Prefix, str] = {}  # of whoever published it last
        self.lost: dict[Prefix, Loss] = {}  # all that was evicted and did not come back
        self.crowded_out: set[Prefix] = set()  # of those, what a full list of the evicted may have dropped
        self.uses: dict[Prefix, int] = {}  # when its last user left
        self.use = 0
        self.now_s = 0.0
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

    # ---- what is said of a miss

    def explain(
        self, tokens: list[int], scope: CacheScope, live: Iterable[Request], *, remembers: bool
    ) -> CacheReport:
        """The report on a prompt.

        Args:
            live: all requests.
            remembers: evicted blocks; without, what it would say instead.
        """
        size, length = self.size, len(tokens)
        start = 0
        while start + size < length and (scope.salt, tuple(tokens[: start + size])) in self.published:
            start += size
        end = start + size
        prefix = scope.salt, tuple(tokens[:end])
        if end > length:
            return CacheReport(length, start, MissReason.PARTIAL_BLOCK, start)
        if prefix in self.published:
            return CacheReport(length, start, MissReason.LAST_TOKEN, start)
        if any(self._will_publish(request, prefix) for request in live):
            return CacheReport(length, start, MissReason.IN_PROGRESS, start)
        loss = self.lost.get(prefix)
        if loss is not None and remembers:
            age_s = self.now_s - loss.when_s
            return CacheReport(length, start, MissReason.EVICTED, start, age_s, loss.cause)
        if start == 0 and any(
            text == prefix[1] and salt != scope.salt and self.tenants[salt, text] == scope.tenant
            for salt, text in self.published
        ):
            return CacheReport(length, start, MissReason.OTHER_SALT, start)
        return self._diverged(tokens, scope, start) or CacheReport(
            length, start, MissReason.NEVER_SEEN, start, memory_full=self.kv.ghosts.overflowed
        )

    def must_remember(self, tokens: list[int], salt: bytes) -> bool:
        """Whether the prefix was evicted, and the list of the evicted had room for it ever since."""
        prefix = salt, tuple(tokens)
        return prefix in self.lost and prefix not in self.crowded_out

    def _crowd_out(self) -> None:
        """Notes what does not fit into the list of the idle and the evicted any more, oldest use first.

        To be called whenever there are more of them: who is used again leaves room, but brings nothing back.
        """
        for prefix, loss in self.lost.items():
            others = [other for other in self.lost.values() if other is not loss]
            later = sum(other.use is None or loss.use is None or other.use > loss.use for other in others)
            if later + len(self.idle) >= self.kv.ghosts.limit:
                self.crowded_out.add(prefix)

    def _will_publish(self, request: Request, prefix: Prefix) -> bool:
        """Whether a running request has the prefix in its prompt and has not confirmed it in this life."""
        running = request.status is Status.RUNNING and request.prompt_len >= len(prefix[1])
        return (
            running and request.confirmed < len(prefix[1]) and self.prefix(request, len(prefix[1])) == prefix
        )

    def _diverged(self, tokens: list[int], scope: CacheScope, start: int) -> CacheReport | None:
        """The longest agreement with anything of the tenant's in the same place; of equal ones the latest
        counts. Of strangers' it is only said that there are some."""
        end, best, nearest, strangers = start + self.size, start if start else 1, None, False
        for salt, text in reversed(self.published):
            if salt == scope.salt and len(text) == end and text[:start] == tuple(tokens[:start]):
                common = next(i for i in range(end) if text[i] != tokens[i])
                if self.tenants[salt, text] != scope.tenant:
                    strangers = True
                elif common >= best:
                    best, nearest = common + 1, text
        at_token = best - 1
        if nearest is not None:
            first = max(at_token - 8, start)
            return CacheReport(
                len(tokens),
                start,
                MissReason.DIVERGED,
                at_token,
                cached_ids=nearest[first : at_token + 16],
                context_start=first,
            )
        return CacheReport(len(tokens), start, MissReason.DIVERGED, start) if strangers and start else None

    # ---- what happens

    def took(self, block_ids: tuple[int, ...]) -> None:
        """Free blocks go first, then the idle one whose content is oldest."""
        for block_id in block_ids:
            if self.free:
                assert block_id in self.free, f"block {block_id} was taken, free were {self.free}"
                self.free.remove(block_id)
            else:
                oldest = self.idle.pop(0)
                assert block_id == oldest, f"block {block_id} was evicted, {oldest} is older"
                self.lose(block_id, EvictionCause.CAPACITY)
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
                self.use += 1
                self.uses.update((prefix, self.use) for prefix, b in self.published.items() if b == block_id)
            else:
                self.free.add(block_id)
        self._crowd_out()

    def publish(self, request: Request, confirmed_before: int) -> None:
        """Publishes the blocks filled between two confirmations; whoever was first stays."""
        for end in range(self.size, request.confirmed + 1, self.size):
            if end > confirmed_before // self.size * self.size:
                block_id = request.block_ids[end // self.size - 1]
                # A bad hash may refuse what a good one takes; it must never take what a good one refuses.
                if self.exact or self.kv.pool.is_kept(block_id):
                    prefix = self.prefix(request, end)
                    if prefix not in self.published:
                        self.published[prefix] = block_id
                        self.tenants[prefix] = request.scope.tenant
                        self.lost.pop(prefix, None)

    def lose(self, block_id: int, cause: EvictionCause) -> None:
        """The block's content, if it has any, is given up."""
        for prefix, holder in list(self.published.items()):
            if holder == block_id:
                del self.published[prefix]
                use = self.uses[prefix] if block_id not in self.held else None
                self.lost[prefix] = Loss(self.now_s, cause, use)
                self.crowded_out.discard(prefix)
        self._crowd_out()

    def reset(self) -> None:
        for block_id in list(self.published.values()):
            self.lose(block_id, EvictionCause.RESET)
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
        assert self.kv.counts.evicted["capacity"] == self.evictions
        assert len(self.kv.prefix) == len(self.published)
        ghosts = self.kv.ghosts
        if self.exact:
            assert len(ghosts) == len(self.idle) + len(self.lost) or ghosts.overflowed
