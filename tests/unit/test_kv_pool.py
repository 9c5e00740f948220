"""The block pool by example: states, order and counts."""

from __future__ import annotations

import pytest

from engine.kv.block_pool import BlockPool


def make_pool(blocks: int = 4) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(blocks + 1, evicted.append), evicted


def test_the_padding_block_is_never_handed_out() -> None:
    pool, _ = make_pool(4)
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    assert pool.num_available == 0


def test_free_blocks_go_before_idle_ones() -> None:
    pool, evicted = make_pool(3)
    first, second = pool.take(2)
    pool.keep([first])
    pool.drop([first])
    pool.drop([second])
    assert (pool.num_idle, pool.num_free) == (1, 2)
    assert first not in pool.take(2)
    assert evicted == []
    assert pool.take(1) == [first]
    assert evicted == [first]


def test_idle_blocks_are_evicted_least_recently_used_first() -> None:
    pool, evicted = make_pool(3)
    a, b, c = pool.take(3)
    for block_id in (b, a, c):
        pool.keep([block_id])
        pool.drop([block_id])
    pool.share([b])  # used again ...
    pool.drop([b])  # ... so now the youngest
    assert list(pool.idle_ids()) == [a, c, b]
    pool.take(2)
    assert evicted == [a, c]


def test_shared_blocks_are_counted_once_however_many_share() -> None:
    pool, _ = make_pool(2)
    (block_id,) = pool.take(1)
    pool.share([block_id])
    pool.share([block_id])
    assert (pool.num_shared, pool.num_in_use) == (1, 1)
    pool.drop([block_id])
    assert pool.num_shared == 1
    pool.drop([block_id])
    assert (pool.num_shared, pool.num_in_use) == (0, 1)
    pool.drop([block_id])
    assert pool.num_in_use == 0


def test_sharing_an_idle_block_takes_it_out_of_the_order() -> None:
    pool, _ = make_pool(1)
    (block_id,) = pool.take(1)
    pool.keep([block_id])
    pool.drop([block_id])
    pool.share([block_id])
    assert pool.num_available == 0 and pool.ref(block_id) == 1 and pool.num_shared == 0


def test_a_forgotten_idle_block_is_free() -> None:
    pool, evicted = make_pool(1)
    (block_id,) = pool.take(1)
    pool.keep([block_id])
    pool.drop([block_id])
    pool.forget(block_id)
    assert (pool.num_free, pool.num_idle) == (1, 0)
    assert pool.take(1) == [block_id] and evicted == []


def test_releasing_twice_is_noticed() -> None:
    pool, _ = make_pool(1)
    (block_id,) = pool.take(1)
    pool.drop([block_id])
    with pytest.raises(AssertionError, match="released more often than taken"):
        pool.drop([block_id])


def test_sharing_a_free_block_is_noticed() -> None:
    pool, _ = make_pool(1)
    with pytest.raises(KeyError):
        pool.share([1])
