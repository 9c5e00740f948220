"""What is known of each block, by example: owners, times, tenants, parents, frames."""

from __future__ import annotations

import pytest

from engine.config import CacheConfig
from engine.kv.block_pool import BlockPool
from engine.kv.manager import KVManager
from engine.request import Request, Status
from engine.types import SamplingParams
from engine.views import CacheScope
from tests.helpers.audit import check_facts, check_kv
from tests.helpers.viewer import Viewer, numbers

P = 4


def make_pool(blocks: int = 4) -> BlockPool:
    return BlockPool(blocks + 1, lambda block_id: None)


def idle(pool: BlockPool, *block_ids: int) -> None:
    for block_id in block_ids:
        pool.keep([block_id])
        pool.drop([block_id])


def run(kv: KVManager, number: int, tokens: list[int], scope: CacheScope) -> Request:
    request = Request(str(number), tokens, SamplingParams(), scope=scope)
    kv.adopt(request, kv.match(request))
    request.status, request.started = Status.RUNNING, True
    kv.reserve(request, len(tokens))
    request.computed = request.confirmed = len(tokens)
    kv.commit(request)
    return request


def leave(kv: KVManager, request: Request) -> None:
    kv.release(request)
    request.status, request.computed = Status.FINISHED, 0


def test_a_block_is_its_takers_until_it_is_free() -> None:
    pool = make_pool()
    facts = pool.facts
    ann = facts.tenant("ann")
    facts.now_ds = 7
    first, second = pool.take(2, owner=41, tenant=ann, position=3)
    assert [facts.owners[first], facts.positions[first], facts.positions[second]] == [41, 3, 4]
    assert (facts.taken_ds[second], facts.tenant_names[facts.tenants[second]]) == (7, "ann")
    idle(pool, first)
    assert (facts.in_use[ann], facts.cached[ann]) == (1, 1)
    assert facts.owners[first] == 41, "it is cached on their account"
    pool.drop([second])
    pool.forget(first)
    assert (facts.in_use[ann], facts.cached[ann]) == (0, 0)
    for block_id in (first, second):
        columns = (facts.owners, facts.tenants, facts.positions, facts.taken_ds, facts.idle_ds)
        assert not any(column[block_id] for column in columns)
    check_facts(pool)


def test_a_blocks_account_moves_when_another_tenant_evicts_it() -> None:
    pool = make_pool(1)
    ann, bob = pool.facts.tenant("ann"), pool.facts.tenant("bob")
    (block_id,) = pool.take(1, 1, ann)
    idle(pool, block_id)
    assert pool.take(1, 2, bob) == [block_id]
    assert (pool.facts.cached, pool.facts.in_use[bob]) == ([0, 0, 0], 1)
    assert pool.facts.owners[block_id] == 2


def test_ages_are_told_at_eviction_and_gaps_at_reuse() -> None:
    pool = make_pool(1)
    facts = pool.facts
    (block_id,) = pool.take(1)
    facts.now_ds = 30
    idle(pool, block_id)
    assert facts.idle_ds[block_id] == 30
    facts.now_ds = 40
    pool.share([block_id])
    assert (facts.reuse_gap_s.total, facts.reused, facts.idle_ds[block_id]) == (1.0, 1, 0)
    facts.now_ds = 60
    pool.drop([block_id])
    facts.now_ds = 100
    pool.take(1)
    assert (facts.age_s.total, facts.idle_s.total) == (10.0, 4.0)
    assert (facts.allocated, facts.taken_ds[block_id]) == (2, 100)


def test_what_is_forgotten_is_not_evicted() -> None:
    pool = make_pool(1)
    (block_id,) = pool.take(1)
    idle(pool, block_id)
    pool.forget(block_id)
    assert sum(pool.facts.age_s.counts) == 0


def test_a_prefix_is_shared_on_the_account_of_who_took_it() -> None:
    kv = KVManager(CacheConfig(P, 17, 1, True, "float32"))
    group = b"group"
    first = run(kv, 1, list(range(2 * P)), CacheScope("ann", group))
    second = run(kv, 2, list(range(2 * P + 1)), CacheScope("bob", group))
    facts = kv.pool.facts
    assert [facts.owners[block_id] for block_id in second.block_ids] == [1, 1, 2]
    assert [facts.in_use[facts.tenant(name)] for name in ("ann", "bob")] == [2, 1]
    check_kv(kv, [first, second])


def test_parents_come_and_go_with_the_blocks_before() -> None:
    kv = KVManager(CacheConfig(P, 17, 1, True, "float32"))
    request = run(kv, 1, list(range(3 * P)), CacheScope())
    head, middle, tail = request.block_ids
    parents = kv.pool.facts.parents
    assert [parents[block_id] for block_id in (head, middle, tail)] == [0, head, middle]
    leave(kv, request)
    kv.pool.share([middle])
    kv.pool.share([tail])
    others = [run(kv, 2 + i, [90 + i] * P, CacheScope()) for i in range(14)]  # the last one takes the head
    assert others[-1].block_ids == [head]
    assert [parents[middle], parents[tail]] == [0, middle]
    leave(kv, others[0])
    leave(kv, others[1])
    again = run(kv, 50, [*range(P), 77], CacheScope())
    assert parents[middle] == again.block_ids[0], "the chain is joined by whoever has its head now"


def test_the_law_names_what_does_not_add_up() -> None:
    pool = make_pool()
    pool.take(1, 5, pool.facts.tenant("ann"))
    pool.facts.in_use[0] += 1
    with pytest.raises(AssertionError, match="miscounted"):
        check_facts(pool)


class TestFrames:
    def test_nothing_is_remembered_while_nobody_looks(self) -> None:
        pool = make_pool()
        idle(pool, *pool.take(2))
        assert pool.facts.dirty is None

    def test_a_full_frame_then_only_what_changed(self) -> None:
        pool = make_pool()
        pool.take(1, 9)
        pool.facts.dirty = set()
        viewer = Viewer()
        viewer.apply(pool.facts.frame(True))
        viewer.expect(pool)
        assert len(viewer.rows["refs"]) == 5
        first, second = pool.take(2, 3)
        pool.drop([first])
        frame = pool.facts.frame(False)
        assert numbers(frame.ids) == sorted([first, second])
        viewer.apply(frame)
        viewer.expect(pool)
        assert pool.facts.frame(False).ids == b""

    def test_one_changed_block(self) -> None:
        pool = make_pool()
        pool.facts.dirty = set()
        pool.facts.frame(True)
        pool.take(1, 2**32 - 1)
        frame = pool.facts.frame(False)
        assert (numbers(frame.ids), numbers(frame.owners), frame.kept) == ([1], [2**32 - 1], b"\0")

    def test_a_large_pool_is_a_copy(self) -> None:
        pool = make_pool(100_000)
        frame = pool.facts.frame(True)
        assert len(frame.refs) == 4 * 100_001 and len(frame.kept) == 100_001
