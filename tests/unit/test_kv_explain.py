"""Why a prompt was not reused any further: every reason, asked by a request and by a probe."""

from __future__ import annotations

import doctest
import tracemalloc
from array import array
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest

import engine.kv.explain
from engine.config import CacheConfig
from engine.kv.explain import MAX_SIBLINGS, common_tokens
from engine.kv.manager import KVManager
from engine.request import Request, Status
from engine.types import SamplingParams
from engine.views import CacheReport, CacheScope, EvictionCause, MissReason
from tests.helpers.audit import list_ghosts

P = 4
OURS = CacheScope("ours", b"salt")


def make_kv(blocks: int = 16, *, prefix_caching: bool = True) -> KVManager:
    return KVManager(CacheConfig(P, blocks + 1, 1, prefix_caching, "float32"))


def start(kv: KVManager, tokens: Sequence[int], scope: CacheScope = OURS, *, confirm: bool = True) -> Request:
    """A request of these tokens, all of them computed."""
    request = Request("r", tokens, SamplingParams(), scope=scope)
    kv.prefix.hash_blocks(request, len(tokens) // P)  # as `prepare` does, however much there is
    kv.adopt(request, kv.match(request))
    request.status, request.started = Status.RUNNING, True
    assert kv.reserve(request, len(tokens)) is not None
    request.computed = len(tokens)
    if confirm:
        request.confirmed = len(tokens)
        kv.commit(request)
    return request


def finish(kv: KVManager, request: Request) -> None:
    kv.release(request)
    request.computed = request.confirmed = 0
    request.status = Status.WAITING


def cache(kv: KVManager, tokens: Sequence[int], scope: CacheScope = OURS) -> None:
    finish(kv, start(kv, tokens, scope))


def counted(kv: KVManager) -> dict[str, Any]:
    """All counts, as they are now."""
    return deepcopy(vars(kv.counts)) | {"hit_ratio": kv.counts.hit_ratio.data()}


def ask(kv: KVManager, tokens: Sequence[int], scope: CacheScope = OURS) -> CacheReport:
    """The report of a request and of a probe, which must agree; only the request is counted."""
    before, remembered = counted(kv), list_ghosts(kv.ghosts)
    probed = kv.probe(tokens, scope)
    assert counted(kv) == before and list_ghosts(kv.ghosts) == remembered, "a probe leaves no trace"
    request = Request("r", tokens, SamplingParams(), scope=scope, explain=True)
    report = kv.account(request, kv.match(request))
    assert report == probed
    misses = before["misses"]
    assert kv.counts.misses == misses | {report.reason: misses[report.reason] + 1}
    silent = Request("r", tokens, SamplingParams(), scope=scope)
    assert kv.account(silent, kv.match(silent)).reason is report.reason
    return report


class TestReasons:
    def test_what_is_left_is_shorter_than_a_block(self) -> None:
        kv = make_kv()
        cache(kv, range(8))
        assert ask(kv, range(10)) == CacheReport(10, 8, MissReason.PARTIAL_BLOCK, 8)
        assert ask(kv, [1, 2]) == CacheReport(2, 0, MissReason.PARTIAL_BLOCK, 0)
        assert ask(kv, [7]) == CacheReport(1, 0, MissReason.PARTIAL_BLOCK, 0)

    def test_all_of_it_is_cached_but_the_last_token_is_computed(self) -> None:
        kv = make_kv()
        cache(kv, range(8))
        assert ask(kv, range(8)) == CacheReport(8, 4, MissReason.LAST_TOKEN, 4)
        assert ask(kv, range(4)) == CacheReport(4, 0, MissReason.LAST_TOKEN, 0)

    def test_a_last_block_that_is_not_cached_has_a_reason_of_its_own(self) -> None:
        kv = make_kv()
        cache(kv, range(4))
        assert ask(kv, range(8)).reason is MissReason.NEVER_SEEN
        cache(kv, [*range(4), 4, 5, 6, 90])
        assert ask(kv, range(8)).at_token == 7

    def test_never_seen(self) -> None:
        kv = make_kv()
        cache(kv, range(8))
        assert ask(kv, range(50, 60)) == CacheReport(10, 0, MissReason.NEVER_SEEN, 0)
        assert ask(kv, range(20)) == CacheReport(20, 8, MissReason.NEVER_SEEN, 8), (
            "nothing goes on from there"
        )

    def test_never_seen_as_far_as_it_is_remembered(self) -> None:
        kv = make_kv(blocks=2)
        for first in range(0, 200, 10):
            cache(kv, range(first, first + 8))
        assert kv.ghosts.overflowed
        report = ask(kv, range(8))
        assert report.reason is MissReason.NEVER_SEEN and report.memory_full

    def test_evicted_for_room(self) -> None:
        kv = make_kv(blocks=3)
        kv.tick(100.0)
        cache(kv, range(8))
        kv.tick(130.5)
        cache(kv, range(50, 62))
        kv.tick(135.0)
        capacity = EvictionCause.CAPACITY
        assert ask(kv, range(9)) == CacheReport(9, 0, MissReason.EVICTED, 0, 4.5, capacity)
        cache(kv, range(8))
        assert ask(kv, range(9)).reason is MissReason.PARTIAL_BLOCK, "it is back"
        assert ask(kv, range(50, 63)).reused_tokens == 4, "the tails went first"
        assert ask(kv, range(50, 63)).evicted_s == 0

    def test_emptied_by_somebody(self) -> None:
        kv = make_kv()
        cache(kv, range(8))
        held = start(kv, range(20, 29))
        kv.tick(7.0)
        kv.reset_prefix_cache()
        kv.tick(9.0)
        expected = CacheReport(9, 0, MissReason.EVICTED, 0, 2.0, EvictionCause.RESET)
        assert ask(kv, range(9)) == ask(kv, range(20, 29)) == expected, "idle or in use"
        finish(kv, held)
        assert ask(kv, range(20, 29)) == expected

    def test_reclaimed_by_the_last_choice(self) -> None:
        kv = make_kv()
        leader = start(kv, range(8), confirm=False)
        follower = Request("f", range(8), SamplingParams(), scope=OURS)
        kv.fork(leader, follower)
        leader.confirmed = 8
        kv.commit(leader)
        finish(kv, leader)
        kv.reserve(follower, 8)
        assert ask(kv, [*range(8), 9]).reason is MissReason.IN_PROGRESS, "it will be published again"
        finish(kv, follower)
        report = ask(kv, [*range(8), 9])
        assert report.reason is MissReason.EVICTED and report.at_token == 4
        assert report.eviction_cause is EvictionCause.RECLAIMED

    def test_diverged_within_a_block(self) -> None:
        kv = make_kv()
        cache(kv, [1, 2, 3, 4, 5, 6, 7, 8])
        assert ask(kv, [1, 2, 3, 4, 5, 6, 90, 91, 92]) == CacheReport(
            9, 4, MissReason.DIVERGED, 6, cached_ids=(5, 6, 7, 8), context_start=4
        )

    def test_diverged_at_once_after_what_was_reused(self) -> None:
        kv = make_kv()
        cache(kv, [1, 2, 3, 4, 5, 6, 7, 8])
        report = ask(kv, [1, 2, 3, 4, 90, 91, 92, 93, 94])
        assert (report.reason, report.at_token) == (MissReason.DIVERGED, 4)

    def test_a_first_block_must_share_a_token(self) -> None:
        kv = make_kv()
        cache(kv, [1, 2, 3, 4])
        assert ask(kv, [9, 2, 3, 4, 5]).reason is MissReason.NEVER_SEEN
        report = ask(kv, [1, 9, 3, 4, 5])
        assert (report.reason, report.at_token, report.cached_ids) == (MissReason.DIVERGED, 1, (1, 2, 3, 4))

    def test_the_nearest_of_several_is_compared(self) -> None:
        kv = make_kv()
        for tail in ([5, 60, 70, 80], [5, 6, 7, 80], [5, 6, 70, 80]):
            cache(kv, [1, 2, 3, 4, *tail])
        report = ask(kv, [1, 2, 3, 4, 5, 6, 7, 8, 9])
        assert report.at_token == 7 and report.cached_ids == (5, 6, 7, 80)

    def test_only_the_newest_siblings_are_compared(self) -> None:
        kv = make_kv(blocks=MAX_SIBLINGS + 10)
        cache(kv, [1, 2, 3, 4, 5, 6, 7, 0])
        for token in range(MAX_SIBLINGS):
            cache(kv, [1, 2, 3, 4, 100 + token, 0, 0, 0])
        assert ask(kv, [1, 2, 3, 4, 5, 6, 7, 8, 9]).at_token == 4
        cache(kv, [1, 2, 3, 4, 5, 6, 0, 0])
        assert ask(kv, [1, 2, 3, 4, 5, 6, 7, 8, 9]).at_token == 6

    def test_a_few_tokens_around_the_difference_are_shown(self) -> None:
        kv = KVManager(CacheConfig(64, 5, 1, True, "float32"))
        cache(kv, range(64))
        report = ask(kv, [*range(20), 99, *range(21, 70)])
        assert report.at_token == 20 and report.context_start == 12
        assert report.cached_ids == tuple(range(12, 36))

    def test_a_strangers_tokens_are_neither_shown_nor_compared(self) -> None:
        kv = make_kv()
        theirs = CacheScope("theirs", OURS.salt)  # of our group: blocks are shared
        cache(kv, [1, 2, 3, 4, 5, 6, 7, 8], theirs)
        report = ask(kv, [1, 2, 3, 4, 5, 9, 9, 9, 9])
        assert report == CacheReport(9, 4, MissReason.DIVERGED, 4), "not at token 5: that would be a guess"
        assert ask(kv, [1, 2, 3, 90, 91]).reason is MissReason.NEVER_SEEN
        cache(kv, [1, 2, 3, 4, 90, 91, 92, 93])
        assert ask(kv, [1, 2, 3, 4, 5, 9, 9, 9, 9]).cached_ids == (90, 91, 92, 93), "his agrees for longer"

    def test_another_salt_of_the_same_tenant(self) -> None:
        kv = make_kv()
        cache(kv, range(8), CacheScope("ours", b"another"))
        assert ask(kv, range(8)) == CacheReport(8, 0, MissReason.OTHER_SALT, 0)
        cache(kv, [0, 1, 90, 91])
        assert ask(kv, range(8)).reason is MissReason.OTHER_SALT, "says more than a shared beginning"
        assert ask(kv, [0, 1, 2, 90, 5]).reason is MissReason.DIVERGED, "all of the block must be equal"

    def test_a_salt_for_each_of_many_users_costs_an_admission_nothing(self) -> None:
        kv = make_kv(blocks=2000)
        for user in range(2000):
            cache(kv, range(4), CacheScope("ours", b"%d" % user))
        request = Request("r", range(8), SamplingParams(), scope=OURS)
        hit = kv.match(request)
        tracemalloc.start()
        assert kv.account(request, hit).reason is MissReason.OTHER_SALT
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 20_000, "the salts were copied"

    def test_other_tenants_are_never_spoken_of(self) -> None:
        kv = make_kv()
        cache(kv, range(8), CacheScope("theirs", b"another"))
        assert ask(kv, range(8)).reason is MissReason.NEVER_SEEN
        kv.reset_prefix_cache()
        assert ask(kv, range(8)).reason is MissReason.NEVER_SEEN
        start(kv, range(8), CacheScope("theirs", b"another"), confirm=False)
        assert ask(kv, range(8)).reason is MissReason.NEVER_SEEN

    def test_somebody_is_computing_it(self) -> None:
        kv = make_kv()
        other = start(kv, range(12), confirm=False)
        assert ask(kv, range(12)) == CacheReport(12, 0, MissReason.IN_PROGRESS, 0)
        assert ask(kv, [*range(7), 90, 91]).reason is MissReason.IN_PROGRESS, "the first block is"
        assert ask(kv, [90, *range(1, 8)]).reason is MissReason.NEVER_SEEN
        other.confirmed = 8
        kv.commit(other)
        assert ask(kv, range(13)) == CacheReport(13, 8, MissReason.IN_PROGRESS, 8)
        finish(kv, other)
        assert ask(kv, range(13)).reason is MissReason.NEVER_SEEN, "it left before it was done"

    def test_a_block_that_is_not_full_is_not_in_progress(self) -> None:
        kv = make_kv()
        start(kv, range(6), confirm=False)
        assert ask(kv, [*range(8), 9]).reason is MissReason.IN_PROGRESS
        cache(kv, range(4))
        assert ask(kv, [*range(8), 9]).reason is MissReason.NEVER_SEEN

    def test_what_is_computed_again_is_in_progress_not_evicted(self) -> None:
        kv = make_kv(blocks=3)
        cache(kv, range(8))
        cache(kv, range(50, 62))
        assert ask(kv, range(9)).reason is MissReason.EVICTED
        start(kv, range(8), confirm=False)
        assert ask(kv, range(9)).reason is MissReason.IN_PROGRESS

    def test_caching_is_off(self) -> None:
        kv = make_kv(prefix_caching=False)
        cache(kv, range(8))
        assert ask(kv, range(9)) == CacheReport(9, 0, MissReason.CACHING_OFF, 0)
        assert kv.counts.prefix_queries == kv.counts.prefix_query_tokens == 0

    def test_prompt_logprobs_are_computed_not_reused(self) -> None:
        kv = make_kv()
        cache(kv, range(8))
        request = Request("r", range(9), SamplingParams(prompt_logprobs=0), scope=OURS)
        report = kv.account(request, kv.match(request))
        assert report == CacheReport(9, 0, MissReason.PROMPT_LOGPROBS, 0)
        assert kv.counts.misses["prompt_logprobs"] == 1 and kv.counts.miss_tokens["prompt_logprobs"] == 9
        assert kv.counts.prefix_queries == kv.counts.prefix_query_tokens == 0

    def test_an_empty_prompt_can_be_asked_about(self) -> None:
        assert make_kv().probe([], OURS) == CacheReport(0, 0, MissReason.PARTIAL_BLOCK, 0)


class TestCounts:
    def test_everything_is_there_from_the_start(self) -> None:
        counts = make_kv().counts
        assert counts.misses == counts.miss_tokens == dict.fromkeys(MissReason, 0)
        assert counts.evicted == dict.fromkeys(EvictionCause, 0)
        assert counts.whatif_hit_tokens == {"0.5": 0, "1": 0, "2": 0, "4": 0, "8": 0}

    def test_requests_and_tokens_add_up(self) -> None:
        kv = make_kv()
        for tokens in (range(10), range(10), range(8), range(50, 57)):
            request = Request("r", tokens, SamplingParams())
            kv.account(request, kv.match(request))
            cache(kv, tokens, CacheScope())
        counts = kv.counts
        assert (counts.prefix_queries, counts.prefix_query_tokens) == (4, 35)
        assert (counts.prefix_hits, counts.prefix_hit_tokens) == (2, 12)
        assert sum(counts.misses.values()) == 4 and sum(counts.miss_tokens.values()) == 35 - 12
        assert counts.misses["partial_block"] == 1 and counts.miss_tokens["partial_block"] == 2
        assert counts.misses["last_token"] == 1 and counts.miss_tokens["last_token"] == 4
        assert sum(counts.hit_ratio.counts) == 4 and counts.hit_ratio.total == 8 / 10 + 4 / 8
        assert counts.whatif_hit_tokens["1"] == counts.whatif_hit_tokens["8"] == 12

    def test_evictions_by_cause(self) -> None:
        kv = make_kv(blocks=3)
        cache(kv, range(12))
        cache(kv, range(50, 58))
        kv.reset_prefix_cache()
        assert kv.counts.evicted == {"capacity": 2, "reset": 3, "reclaimed": 0}
        assert kv.num_ghosts == 5

    def test_ghosts_are_what_was_evicted_not_what_is_idle(self) -> None:
        kv = make_kv(blocks=3)
        cache(kv, range(12))
        assert kv.pool.num_idle == 3 and kv.num_ghosts == 0
        cache(kv, range(50, 58))
        assert kv.pool.num_idle == 3 and kv.num_ghosts == 2
        cache(kv, range(12))
        assert kv.num_ghosts == 2, "two came back, two were lost for them"


class TestTree:
    def test_parents_and_children(self) -> None:
        kv = make_kv()
        one = start(kv, [*range(8), 20, 21, 22, 23])
        two = start(kv, [*range(8), 30, 31, 32, 33])
        head, trunk, left = one.block_ids
        right = two.block_ids[2]
        assert [kv.prefix.parent_of(block_id) for block_id in (head, trunk, right)] == [0, head, trunk]
        assert kv.prefix.children_of(head) == (trunk,) and kv.prefix.children_of(trunk) == (right, left)
        assert kv.prefix.children_of(right) == ()
        free = kv.pool.num_blocks
        assert kv.prefix.parent_of(free) == 0 and kv.prefix.children_of(free) == ()

    def test_a_lost_block_is_nobodys_child_and_nobodys_parent(self) -> None:
        kv = make_kv(blocks=4)
        cache(kv, range(12))
        blocks = kv.match(Request("r", range(13), SamplingParams(), scope=OURS)).block_ids
        cache(kv, range(50, 58))
        assert kv.prefix.children_of(blocks[1]) == () and kv.prefix.parent_of(blocks[1]) == blocks[0]


@pytest.mark.parametrize(
    ("other", "common"),
    [([1, 2, 3], 3), ([1, 2, 4], 2), ([1, 258, 3], 1), ([1, 2 + (1 << 31), 3], 1), ([0, 2, 3], 0)],
)
def test_common_tokens(other: list[int], common: int) -> None:
    assert common_tokens(array("I", [1, 2, 3]).tobytes(), array("I", other).tobytes()) == common


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(engine.kv.explain)
    assert result.attempted and not result.failed
