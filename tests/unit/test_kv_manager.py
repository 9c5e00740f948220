"""The KV cache by example: hits, forks, room, and what is never shared."""

from __future__ import annotations

import doctest
from collections.abc import Sequence

import pytest

import engine.kv.page_table
from engine.config import CacheConfig
from engine.kv.manager import KVManager
from engine.kv.prefix import Digest, sha256_digest
from engine.request import Request, Status
from engine.types import SamplingParams
from engine.views import CacheScope, EvictionCause
from tests.helpers.audit import check_kv

P = 4


def make_kv(blocks: int = 16, *, prefix_caching: bool = True, digest: Digest = sha256_digest) -> KVManager:
    return KVManager(CacheConfig(P, blocks + 1, 1, prefix_caching, "float32"), digest)


def make_request(tokens: Sequence[int], salt: bytes = b"", params: SamplingParams | None = None) -> Request:
    return Request("r", tokens, params or SamplingParams(), scope=CacheScope(salt=salt))


def run_prompt(kv: KVManager, request: Request, *, confirm: bool = True) -> Request:
    """Admits a request and computes all it knows, as one step does."""
    kv.adopt(request, kv.match(request))
    request.status, request.started = Status.RUNNING, True
    assert kv.reserve(request, len(request.token_ids)) is not None
    request.computed = len(request.token_ids)
    if confirm:
        request.confirmed = request.computed
        kv.commit(request)
    return request


def release(kv: KVManager, request: Request) -> None:
    kv.release(request)
    request.computed = request.confirmed = 0
    request.status = Status.WAITING


class TestMatch:
    def test_full_blocks_of_an_equal_prefix_are_shared(self) -> None:
        kv = make_kv()
        first = run_prompt(kv, make_request(range(10)))
        second = make_request([*range(8), 99, 98, 97])
        hit = kv.match(second)
        assert hit.block_ids == tuple(first.block_ids[:2]) and hit.tokens == 8 and hit.idle_blocks == 0
        run_prompt(kv, second)
        assert kv.pool.num_shared == 2
        check_kv(kv, [first, second])

    @pytest.mark.parametrize(("length", "cached"), [(4, 0), (5, 4), (8, 4), (9, 8)])
    def test_the_last_token_is_always_left_to_compute(self, length: int, cached: int) -> None:
        kv = make_kv()
        run_prompt(kv, make_request(range(12)))
        assert kv.match(make_request(range(length))).tokens == cached

    def test_blocks_of_a_finished_request_are_found_again(self) -> None:
        kv = make_kv()
        first = run_prompt(kv, make_request(range(9)))
        release(kv, first)
        hit = kv.match(make_request(range(9)))
        assert hit.tokens == 8 and hit.idle_blocks == 2
        assert kv.pool.num_in_use == 0 and kv.pool.num_idle == 2

    def test_another_salt_never_hits(self) -> None:
        kv = make_kv()
        run_prompt(kv, make_request(range(9), salt=b"tenant a"))
        assert kv.match(make_request(range(9), salt=b"tenant b")).tokens == 0
        assert kv.match(make_request(range(9))).tokens == 0
        assert kv.match(make_request(range(9), salt=b"tenant a")).tokens == 8

    def test_the_same_tokens_after_another_beginning_do_not_hit(self) -> None:
        kv = make_kv()
        run_prompt(kv, make_request([1, 1, 1, 1, 7, 7, 7, 7, 0]))
        assert kv.match(make_request([7, 7, 7, 7, 0])).tokens == 0
        assert kv.match(make_request([2, 2, 2, 2, 7, 7, 7, 7, 0])).tokens == 0

    def test_nothing_is_read_for_prompt_logprobs_or_without_the_cache(self) -> None:
        kv = make_kv()
        run_prompt(kv, make_request(range(9)))
        assert kv.match(make_request(range(9), params=SamplingParams(prompt_logprobs=0))).tokens == 0
        off = make_kv(prefix_caching=False)
        run_prompt(off, make_request(range(9)))
        assert off.match(make_request(range(9))).tokens == 0 and len(off.prefix) == 0

    def test_what_is_not_confirmed_is_not_found(self) -> None:
        kv = make_kv()
        run_prompt(kv, make_request(range(9)), confirm=False)
        assert kv.match(make_request(range(9))).tokens == 0

    def test_a_chain_without_its_head_is_not_found_and_joins_again(self) -> None:
        kv = make_kv(blocks=6)
        first = run_prompt(kv, make_request(range(8)))
        twin = make_request([*range(8), 50, 51, 52, 53])
        twin.status, twin.started = Status.RUNNING, True
        kv.reserve(twin, 12)  # computed beside the first, not from the cache
        twin.computed = twin.confirmed = 12
        kv.commit(twin)
        check_kv(kv, [first, twin])
        assert kv.match(make_request([*range(8), 50, 51, 52, 53, 0])).tokens == 12
        release(kv, first)
        thief = make_request([70, 71, 72])
        run_prompt(kv, thief)  # takes the last free block
        run_prompt(kv, thief2 := make_request([80] * 8))  # evicts the first's two
        assert kv.match(make_request([*range(8), 50, 51, 52, 53, 0])).tokens == 0
        release(kv, thief2)
        again = run_prompt(kv, make_request(range(8)))
        assert kv.match(make_request([*range(8), 50, 51, 52, 53, 0])).tokens == 12
        check_kv(kv, [twin, thief, again])


class TestForgedHashes:
    def test_a_constant_hash_serves_nobody_elses_tokens(self) -> None:
        kv = make_kv(digest=lambda data: b"same")
        first = run_prompt(kv, make_request(range(9)))
        assert kv.match(make_request([9, 9, 9, 9, 9])).tokens == 0
        assert kv.match(make_request(range(5), salt=b"x")).tokens == 0
        assert kv.match(make_request(range(9))).tokens == 4  # the one block that got the digest
        check_kv(kv, [first])

    def test_equal_tokens_under_a_colliding_parent_do_not_hit(self) -> None:
        """The child's own tokens are equal, its digest is equal; what came before is not."""

        def digest(data: bytes) -> bytes:
            return b"parent" if len(data) == P * 4 else b"child"

        kv = make_kv(digest=digest)
        first = run_prompt(kv, make_request([1, 1, 1, 1, 7, 7, 7, 7]))
        release(kv, first)
        kv._forget(parent := kv.match(make_request([1, 1, 1, 1, 0])).block_ids[0], EvictionCause.RESET)
        kv.pool.forget(parent)
        second = run_prompt(kv, make_request([2, 2, 2, 2, 0]))
        assert kv.match(make_request([2, 2, 2, 2, 7, 7, 7, 7, 0])).tokens == 4
        check_kv(kv, [second])


class TestReserve:
    def test_no_room_leaves_no_trace(self) -> None:
        kv = make_kv(blocks=2)
        first = make_request(range(5))
        run_prompt(kv, first)
        second = make_request([8, 9])
        assert kv.reserve(second, 2) is None
        assert second.block_ids == [] and kv.pool.num_in_use == 2

    def test_only_missing_blocks_are_taken(self) -> None:
        kv = make_kv()
        request = make_request(range(20))
        new = kv.reserve(request, 3)
        assert new is not None and len(new) == 1
        assert kv.reserve(request, 4) == ()
        assert len(kv.reserve(request, 9) or ()) == 2

    def test_the_tail_of_a_chain_is_evicted_before_its_head(self) -> None:
        kv = make_kv(blocks=3)
        first = run_prompt(kv, make_request(range(12)))
        release(kv, first)
        run_prompt(kv, make_request([90]))
        assert kv.match(make_request(range(12))).tokens == 8
        assert kv.counts.evicted["capacity"] == 1


class TestCommit:
    def test_of_two_equal_blocks_the_first_stays(self) -> None:
        kv = make_kv()
        one, two = make_request(range(5)), make_request(range(5))
        for request in (one, two):
            kv.reserve(request, 5)
            request.computed = request.confirmed = 5
            request.status, request.started = Status.RUNNING, True
        kv.commit(one)
        kv.commit(two)
        assert kv.match(make_request(range(5))).block_ids == (one.block_ids[0],)
        check_kv(kv, [one, two])
        release(kv, two)
        assert kv.pool.num_idle == 0, "a duplicate is not kept"

    def test_each_block_is_hashed_once(self) -> None:
        calls = 0

        def digest(data: bytes) -> bytes:
            nonlocal calls
            calls += 1
            return sha256_digest(data)

        kv = make_kv(digest=digest)
        request = make_request(range(12))
        for _ in range(3):
            kv.match(request)
        run_prompt(kv, request)
        release(kv, request)
        run_prompt(kv, request)
        assert calls == 3

    def test_reset_forgets_what_is_idle_and_what_is_in_use(self) -> None:
        kv = make_kv()
        first, second = run_prompt(kv, make_request(range(9))), run_prompt(kv, make_request([5] * 9))
        release(kv, first)
        kv.reset_prefix_cache()
        check_kv(kv, [second])
        assert kv.match(make_request(range(9))).tokens == kv.match(make_request([5] * 9)).tokens == 0
        assert kv.pool.num_idle == 0
        release(kv, second)
        assert kv.pool.num_free == kv.pool.num_blocks


class TestFork:
    def forked(self, kv: KVManager, prompt_len: int) -> tuple[Request, Request]:
        leader = run_prompt(kv, make_request(range(prompt_len)), confirm=False)
        follower = make_request(range(prompt_len))
        kv.fork(leader, follower)
        follower.status = Status.RUNNING
        check_kv(kv, [leader, follower])
        return leader, follower

    @pytest.mark.parametrize(
        ("prompt_len", "shared", "copies"), [(10, 2, True), (8, 1, True), (9, 2, False), (1, 0, False)]
    )
    def test_the_prompt_is_shared_but_for_the_last_tokens_block(
        self, prompt_len: int, shared: int, copies: bool
    ) -> None:
        kv = make_kv()
        leader, follower = self.forked(kv, prompt_len)
        assert follower.block_ids == leader.block_ids[:shared] and follower.computed == prompt_len - 1
        new = kv.reserve(follower, prompt_len)
        assert new is not None and len(new) == 1
        assert kv.take_copy(follower) == ((leader.block_ids[shared], new[0]) if copies else None)
        assert kv.take_copy(follower) is None
        follower.started, follower.computed = True, prompt_len
        check_kv(kv, [leader, follower])

    def test_the_source_is_held_until_it_is_copied(self) -> None:
        kv = make_kv()
        leader, follower = self.forked(kv, 10)
        other = make_request(range(10))
        kv.fork(leader, other)
        other.status = Status.RUNNING
        source = leader.block_ids[2]
        release(kv, leader)
        check_kv(kv, [follower, other])
        new = kv.reserve(follower, 10)
        assert new is not None and kv.take_copy(follower) == (source, new[0])
        assert kv.pool.ref(source) == 1

    def test_the_last_holder_needs_no_copy(self) -> None:
        kv = make_kv(blocks=3)
        leader, follower = self.forked(kv, 12)
        source = leader.block_ids[2]
        leader.confirmed = 12
        kv.commit(leader)
        release(kv, leader)
        assert kv.reserve(follower, 12) == (), "the pool is full: a copy would never fit"
        assert follower.block_ids[2] == source and kv.take_copy(follower) is None
        assert not kv.pool.is_kept(source), "it will be written to"
        follower.started, follower.computed = True, 12
        check_kv(kv, [follower])

    def test_a_follower_that_never_ran_gives_all_back(self) -> None:
        kv = make_kv()
        leader, follower = self.forked(kv, 10)
        release(kv, follower)
        release(kv, leader)
        check_kv(kv, [])
        assert kv.pool.num_in_use == 0


class TestCheck:
    def test_it_names_what_does_not_add_up(self) -> None:
        kv = make_kv()
        request = run_prompt(kv, make_request(range(6)))
        check_kv(kv, [request])
        with pytest.raises(AssertionError, match="not the pool"):
            check_kv(kv, [])
        kv.pool.share([request.block_ids[0]])
        with pytest.raises(AssertionError, match="2 refs, 1 holders"):
            check_kv(kv, [request])

    def test_tokens_held_counts_shared_blocks_once(self) -> None:
        kv = make_kv()
        first = run_prompt(kv, make_request(range(10)))
        second = run_prompt(kv, make_request([*range(8), 40]))
        assert kv.tokens_held([first, second]) == 8 + 2 + 1

    def test_tokens_held_of_a_tail_that_is_still_to_be_copied(self) -> None:
        kv = make_kv()
        leader, followers = run_prompt(kv, make_request(range(10))), [make_request(range(10)) for _ in "ab"]
        for follower in followers:
            kv.fork(leader, follower)
        assert kv.tokens_held([leader, *followers]) == 10
        release(kv, leader)
        assert kv.tokens_held(followers) == 9, "one token of the prompt is computed again"


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(engine.kv.page_table)
    assert result.attempted and not result.failed
