"""The list of idle and evicted contents: by example, and against pools that are really kept."""

from __future__ import annotations

import random
from collections import OrderedDict
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.ghosts import MAX_ENTRIES, Ghosts
from engine.views import WHATIF_SIZES, EvictionCause
from tests.helpers.audit import check_ghosts

CAPACITY, RESET = EvictionCause.CAPACITY, EvictionCause.RESET
NOWHERE = len(WHATIF_SIZES)


def digest(content: int) -> bytes:
    return sha256(b"%d" % content).digest()


def released(ghosts: Ghosts, *contents: int) -> Ghosts:
    for content in contents:
        ghosts.released([digest(content)])
    return ghosts


def zones(ghosts: Ghosts, *contents: int) -> list[int]:
    return list(ghosts.zones(map(digest, contents)))


class TestZones:
    def test_what_was_used_longest_ago_leaves_the_small_pools_first(self) -> None:
        ghosts = released(Ghosts(4), 1, 2, 3, 4)
        assert zones(ghosts, 1, 2, 3, 4) == [0, 0, 0, 0], "nobody needed room yet"
        ghosts.taken(in_use=1)  # pools of 2, 4, 8 ... blocks beside one in use
        assert zones(ghosts, 1, 2, 3, 4) == [2, 1, 1, 0]
        ghosts.taken(in_use=3)
        assert zones(ghosts, 1, 2, 3, 4) == [2, 2, 2, 1]

    def test_room_that_came_back_is_not_filled_with_what_was_lost(self) -> None:
        ghosts = released(Ghosts(4), 1, 2)
        ghosts.taken(in_use=4)
        ghosts.taken(in_use=1)
        assert zones(ghosts, 1, 2) == [2, 2]

    def test_a_content_in_use_is_not_listed(self) -> None:
        ghosts = released(Ghosts(4), 1, 2, 3)
        ghosts.used([digest(2)])
        ghosts.used([digest(9)])
        assert zones(ghosts, 1, 2, 3) == [0, -1, 0] and len(ghosts) == 2
        assert zones(released(ghosts, 2), 2) == [0]

    def test_all_pools_are_emptied_together(self) -> None:
        ghosts = released(Ghosts(4), 1, 2, 3)
        ghosts.taken(in_use=2)
        for content in (1, 2, 3):
            ghosts.lost(digest(content), 5.0, RESET)
        ghosts.emptied()
        check_ghosts(ghosts)
        assert zones(ghosts, 1, 2, 3) == [NOWHERE] * 3
        assert zones(released(ghosts, 4), 1, 4) == [NOWHERE, 0]
        check_ghosts(ghosts)

    def test_an_empty_list_can_be_emptied(self) -> None:
        ghosts = Ghosts(4)
        ghosts.emptied()
        check_ghosts(released(ghosts, 1))


class TestRecall:
    def test_time_and_cause_of_an_eviction(self) -> None:
        ghosts = released(Ghosts(4), 1, 2)
        ghosts.lost(digest(1), 12.34, CAPACITY)
        ghosts.lost(digest(3), 20.0, EvictionCause.RECLAIMED)  # from under its user's hands
        assert ghosts.recall(digest(1)) == (12.3, CAPACITY)
        assert ghosts.recall(digest(3)) == (20.0, EvictionCause.RECLAIMED)
        assert ghosts.recall(digest(2)) is None, "idle"
        assert ghosts.recall(digest(4)) is None, "never heard of"
        assert zones(ghosts, 1, 2, 3) == [0, 0, NOWHERE]
        check_ghosts(ghosts)

    def test_an_eviction_is_forgotten_once_the_content_is_back(self) -> None:
        ghosts = released(Ghosts(4), 1)
        ghosts.lost(digest(1), 1.0, CAPACITY)
        ghosts.used([digest(1)])
        assert ghosts.recall(digest(1)) is None
        assert released(ghosts, 1).recall(digest(1)) is None


class TestSize:
    def test_the_oldest_are_dropped_when_it_is_full(self) -> None:
        ghosts = released(Ghosts(1, limit=3), 1, 2, 3)
        assert not ghosts.overflowed
        released(ghosts, 4)
        assert ghosts.overflowed and len(ghosts) == 3
        assert zones(ghosts, 1, 2, 3, 4) == [-1, 0, 0, 0]
        check_ghosts(ghosts)

    @pytest.mark.parametrize(
        ("num_blocks", "limit"),
        [(10, 80), (MAX_ENTRIES // 4, MAX_ENTRIES), (MAX_ENTRIES, 2 * MAX_ENTRIES)],
    )
    def test_how_many_are_remembered(self, num_blocks: int, limit: int) -> None:
        assert Ghosts(num_blocks).limit == limit

    def test_an_entry_takes_a_few_tens_of_bytes(self) -> None:
        ghosts = Ghosts(1000)
        contents = random.Random(1).sample(range(10**9), 3 * ghosts.limit)
        for content in contents:
            released(ghosts, content)
        assert len(ghosts) == ghosts.limit
        columns = (ghosts._keys, ghosts._older, ghosts._newer, ghosts._lost_at, ghosts._state, ghosts._table)
        assert sum(memoryview(column).nbytes for column in columns) / len(ghosts) < 40


class Pool:
    """A pool of one size, kept as plainly as possible: the idle contents, oldest first."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.idle: OrderedDict[int, None] = OrderedDict()

    def take(self, in_use: int) -> None:
        while self.idle and len(self.idle) + in_use > self.blocks:
            self.idle.popitem(last=False)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("release"), st.integers(0, 30)),
        st.tuples(st.just("release"), st.integers(0, 30)),
        st.tuples(st.just("use"), st.integers(0, 30)),
        st.tuples(st.just("lose"), st.integers(0, 30)),
        st.tuples(st.just("take"), st.integers(0, 9)),
        st.tuples(st.just("take"), st.integers(0, 3)),
        st.tuples(st.just("empty"), st.just(0)),
    ),
    max_size=120,
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(operations=operations, num_blocks=st.integers(1, 7), limit=st.integers(2, 40))
def test_it_follows_pools_of_all_sizes(
    operations: list[tuple[str, int]], num_blocks: int, limit: int
) -> None:
    """Each zone is what the pools have; an LRU list says who is dropped; a dict says who was evicted."""
    ghosts = Ghosts(num_blocks, limit=limit)
    pools = [Pool(int(size * num_blocks)) for size in WHATIF_SIZES]
    listed: set[int] = set()
    evicted: dict[int, float] = {}
    for now, (what, number) in enumerate(operations):
        if what == "release":
            ghosts.released([digest(number)])
            listed.add(number)
            evicted.pop(number, None)
            for pool in pools:
                pool.idle.pop(number, None)
                pool.idle[number] = None
        elif what == "use":
            ghosts.used([digest(number)])
            listed.discard(number)
            evicted.pop(number, None)
            for pool in pools:
                pool.idle.pop(number, None)
        elif what == "lose":
            ghosts.lost(digest(number), now, CAPACITY)
            listed.add(number)
            evicted[number] = now
        elif what == "take":
            ghosts.taken(number)
            for pool in pools:
                pool.take(number)
        else:
            ghosts.emptied()
            for pool in pools:
                pool.idle.clear()
        check_ghosts(ghosts)
        dropped = {content for content in listed if zones(ghosts, content) == [-1]}
        assert len(listed) - len(dropped) == len(ghosts)
        if dropped:
            assert ghosts.overflowed and len(dropped) == 1 and len(ghosts) == ghosts.limit
            (gone,) = dropped
            for pool in pools:  # nobody has what was dropped, unless it was the oldest of them all
                assert gone not in pool.idle or next(iter(pool.idle)) == gone
                pool.idle.pop(gone, None)
            listed.discard(gone)
            evicted.pop(gone, None)
        for content in range(31):
            has = [content in pool.idle for pool in pools]
            zone = has.index(True) if any(has) else NOWHERE if content in listed else -1
            assert zones(ghosts, content) == [zone], f"{what} {number}: content {content}"
            expected = (evicted[content], CAPACITY) if content in evicted else None
            assert ghosts.recall(digest(content)) == expected
