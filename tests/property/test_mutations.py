"""Known bugs, planted one at a time: each must be caught, or the machines prove nothing.

A mutation replaces one method by a copy with a mistake. The machines then run with few cases and must
fail; without a mutation such cases must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis.stateful import RuleBasedStateMachine

from engine.core import EngineCore
from engine.kv.block_pool import BlockPool
from engine.kv.explain import Explainer
from engine.kv.facts import BlockFacts
from engine.kv.ghosts import Ghosts
from engine.kv.manager import KVManager
from engine.kv.page_table import split_for_fork
from engine.kv.prefix import PrefixCache, Published
from engine.kv.tree import PrefixTree
from engine.request import BlockKey, Request, Status
from engine.sched.budget import StepBudget
from engine.sched.draft import Planned, StepDraft
from engine.sched.queue import Queue
from engine.sched.roster import Roster
from engine.sched.scheduler import Scheduler
from engine.sched.tally import Tally
from engine.types import FinishReason
from engine.views import CacheReport, EvictionCause
from tests.property.kv_machine import ConstantHashKVMachine, KVMachine, WeakHashKVMachine
from tests.property.runs import run_machine
from tests.property.sched_machine import SchedMachine

Patch = Callable[[pytest.MonkeyPatch], None]
Machine = type[RuleBasedStateMachine]

EXAMPLES = 500  # at most: a run ends with the first failure, mostly within a few
CLEAN_EXAMPLES = 100
STEPS = 50
mutations: list[Any] = []


def caught_by(*machines: Machine) -> Callable[[Patch], Patch]:
    """Registers a mutation with the machines of which each must catch it."""

    def register(patch: Patch) -> Patch:
        for machine in machines:
            name = f"{patch.__name__}-{machine.__name__}"
            mutations.append(pytest.param(patch, machine, id=name))
        return patch

    return register


# ---- the block pool


@caught_by(KVMachine, SchedMachine)
def a_decref_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of a page table is not given back."""

    def release(self: KVManager, request: Request) -> None:
        self.pool.drop(request.block_ids[:0:-1])
        request.block_ids, request.num_published = [], 0

    monkeypatch.setattr(KVManager, "release", release)


@caught_by(KVMachine, SchedMachine)
def a_block_is_freed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockPool.drop

    def drop(self: BlockPool, block_ids: Sequence[int]) -> list[int]:
        idled = original(self, block_ids)
        gone = [i for i in block_ids if self.ref(i) == 0 and not self.is_kept(i)]
        self._free += [block_id for block_id in gone if block_id % 3 == 0]
        return idled

    monkeypatch.setattr(BlockPool, "drop", drop)


@caught_by(KVMachine)
def the_lru_order_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most recently used idle block is evicted."""

    def evict(self: BlockPool) -> int:
        block_id, _ = self._idle.popitem(last=True)
        self._kept[block_id] = 0
        self._on_evict(block_id)
        return block_id

    monkeypatch.setattr(BlockPool, "_evict", evict)


@caught_by(KVMachine)
def the_head_of_a_chain_is_evicted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: KVManager, request: Request) -> None:
        if request.copy_source is not None:
            self.pool.drop([request.copy_source])
            request.copy_source = None
        self.pool.drop(request.block_ids)
        request.block_ids, request.num_published = [], 0

    monkeypatch.setattr(KVManager, "release", release)


@caught_by(KVMachine, SchedMachine)
def the_padding_block_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockPool.__init__

    def init(self: BlockPool, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        original(self, num_blocks, on_evict)
        self._free[-1] = 0

    monkeypatch.setattr(BlockPool, "__init__", init)


@caught_by(KVMachine, SchedMachine)
def an_evicted_block_stays_in_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "forget", lambda self, block_id: None)


# ---- the prefix cache


@caught_by(KVMachine, SchedMachine)
def the_hash_ignores_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are known by their own tokens alone, wherever they stand."""

    def key(self: PrefixCache, request: Request, index: int) -> BlockKey:
        [content] = self._contents(request, index, index + 1)
        return BlockKey(self._digest(content), content, None)

    def hash_all(self: PrefixCache, request: Request, end: int) -> None:
        keys = request.block_keys
        keys += [key(self, request, index) for index in range(len(keys), end)]

    def find(self: PrefixCache, request: Request, first: int, end: int) -> list[int]:
        found = []
        for index in range(first, end):
            entry = self._entries.get(key(self, request, index).digest)
            if entry is None:
                break
            found.append(entry.block_id)
        return found

    monkeypatch.setattr(PrefixCache, "_hash", hash_all)
    monkeypatch.setattr(PrefixCache, "find", find)


@caught_by(WeakHashKVMachine, ConstantHashKVMachine)
def a_hash_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.kv.prefix.same_content", lambda one, other: True)


@caught_by(WeakHashKVMachine)
def only_a_blocks_own_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.kv.prefix.same_content", lambda one, other: one.content == other.content)


@caught_by(KVMachine)
def the_salt_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefixCache._contents

    def contents(self: PrefixCache, request: Request, first: int, end: int) -> list[bytes]:
        return [content[-4 * self._block_size :] for content in original(self, request, first, end)]

    monkeypatch.setattr(PrefixCache, "_contents", contents)


@caught_by(KVMachine, SchedMachine)
def a_hit_takes_a_partial_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding goes up: the last token is not left to compute."""
    original = KVManager.match

    def match(self: KVManager, request: Request) -> Any:
        hit = original(self, request)
        found = self.prefix.find(request, 0, len(request.token_ids) // self.block_size)
        idle = self.pool.count_idle(found)
        return hit._replace(
            block_ids=tuple(found), tokens=len(found) * self.block_size, idle_blocks=idle
        ) if self.reads_prefix(request) else hit  # fmt: skip

    monkeypatch.setattr(KVManager, "match", match)


@caught_by(KVMachine)
def a_block_is_published_before_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(self: KVManager, request: Request) -> None:
        published = self.prefix.publish(
            request, request.block_ids, request.num_published, len(request.block_ids)
        )
        self.pool.keep(published.block_ids)
        request.num_published = len(request.block_ids)

    monkeypatch.setattr(KVManager, "commit", commit)


@caught_by(SchedMachine)
def a_published_block_is_misfiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A content enters the cache as that of the block after its own."""
    original = PrefixCache.publish

    def publish(self: PrefixCache, request: Request, first: int, end: int) -> Published:
        table = request.block_ids
        request.block_ids = [*table[1:], table[0]]
        published = original(self, request, first, end)
        request.block_ids = table
        return published

    monkeypatch.setattr(PrefixCache, "publish", publish)


# ---- forks


@caught_by(KVMachine, SchedMachine)
def a_fork_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_copy(self: KVManager, request: Request) -> None:
        if request.copy_source is not None:
            self.pool.drop([request.copy_source])
            request.copy_source = None

    monkeypatch.setattr(KVManager, "take_copy", take_copy)


@caught_by(KVMachine, SchedMachine)
def a_fork_shares_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leader and follower write to the same block."""

    def fork(self: KVManager, leader: Request, follower: Request) -> None:
        follower.block_ids = list(leader.block_ids[: -(-leader.prompt_len // self.block_size)])
        self.pool.share(follower.block_ids)
        follower.computed = leader.prompt_len - 1

    monkeypatch.setattr(KVManager, "fork", fork)


@caught_by(KVMachine, SchedMachine)
def a_forks_source_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail may be given to somebody else before it is copied."""

    def fork(self: KVManager, leader: Request, follower: Request) -> None:
        split = split_for_fork(leader.prompt_len, self.block_size)
        follower.block_ids = leader.block_ids[: split.shared_blocks]
        self.pool.share(follower.block_ids)
        if split.copied_tokens:
            follower.copy_source = leader.block_ids[split.shared_blocks]
        follower.computed = leader.prompt_len - 1

    monkeypatch.setattr(KVManager, "fork", fork)


@caught_by(KVMachine)
def an_inherited_tail_stays_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower writes into a block that others may find."""

    def inherit(self: KVManager, request: Request) -> None:
        assert request.copy_source is not None
        request.block_ids.append(request.copy_source)
        request.copy_source = None

    monkeypatch.setattr(KVManager, "_inherit", inherit)


# ---- what is remembered, and what is said of a miss


@caught_by(KVMachine, SchedMachine)
def what_is_used_again_stays_a_ghost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ghosts, "used", lambda self, digests: None)


@caught_by(KVMachine)
def what_is_computed_again_stays_a_ghost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only adopted blocks are taken from the list."""

    def commit(self: KVManager, request: Request) -> None:
        used, self.ghosts.used = self.ghosts.used, lambda digests: None  # type: ignore[method-assign]
        original(self, request)
        self.ghosts.used = used  # type: ignore[method-assign]

    original = KVManager.commit
    monkeypatch.setattr(KVManager, "commit", commit)


@caught_by(KVMachine, SchedMachine)
def an_eviction_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ghosts, "lost", lambda self, digest, now_s, cause: None)


@caught_by(KVMachine)
def a_reset_is_called_an_eviction_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ghosts.lost

    def lost(self: Ghosts, digest: bytes, now_s: float, cause: EvictionCause) -> None:
        original(self, digest, now_s, EvictionCause.CAPACITY)

    monkeypatch.setattr(Ghosts, "lost", lost)


@caught_by(KVMachine)
def the_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVManager, "tick", lambda self, now_s: None)


@caught_by(KVMachine, SchedMachine)
def other_sizes_of_pool_never_need_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ghosts, "taken", lambda self, in_use: None)


@caught_by(KVMachine)
def other_sizes_of_pool_survive_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ghosts, "emptied", lambda self: None)


@caught_by(KVMachine)
def the_wrong_ghost_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full list forgets what was used last."""

    def drop(self: Ghosts) -> None:
        self.overflowed = True
        slot = self._older[0]
        while slot < self._first:
            slot = self._older[slot]
        self._unlink(slot)
        self._delete(slot)

    monkeypatch.setattr(Ghosts, "_drop_oldest", drop)


@caught_by(KVMachine)
def a_full_list_forgets_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ghosts._drop_oldest

    def drop(self: Ghosts) -> None:
        original(self)
        self.overflowed = False

    monkeypatch.setattr(Ghosts, "_drop_oldest", drop)


@caught_by(KVMachine, SchedMachine)
def a_lost_block_remains_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixTree, "remove", lambda self, key, block_id, tenant: None)


@caught_by(KVMachine, SchedMachine)
def only_the_newest_child_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefixTree.add

    def add(self: PrefixTree, key: BlockKey, block_id: int, tenant: str) -> None:
        self._newest.pop(self.place(key), None)
        original(self, key, block_id, tenant)

    monkeypatch.setattr(PrefixTree, "add", add)


@caught_by(KVMachine)
def another_tenants_tokens_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Explainer._diverged

    def diverged(self: Explainer, request: Request, key: BlockKey, start: int) -> CacheReport | None:
        monkeypatch.setattr(PrefixCache, "tenant_of", lambda self, block_id: request.scope.tenant)
        return original(self, request, key, start)

    monkeypatch.setattr(Explainer, "_diverged", diverged)


@caught_by(KVMachine)
def another_tenants_salt_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_other_salt(self: PrefixTree, tenant: str, tokens: bytes, salt: bytes) -> bool:
        return any(found - {salt} for (_, text), found in self._salts.items() if text == tokens)

    monkeypatch.setattr(PrefixTree, "has_other_salt", has_other_salt)


@caught_by(KVMachine, SchedMachine)
def a_block_is_put_on_the_wrong_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of salts believes that everything is one tenant's."""
    original = PrefixTree.add

    def add(self: PrefixTree, key: BlockKey, block_id: int, tenant: str) -> None:
        original(self, key, block_id, "ann")

    monkeypatch.setattr(PrefixTree, "add", add)


@caught_by(KVMachine)
def a_request_that_left_is_still_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    original = KVManager.release

    def release(self: KVManager, request: Request) -> None:
        original(self, request)
        self._running[request] = None

    monkeypatch.setattr(KVManager, "release", release)


@caught_by(KVMachine)
def a_tail_is_taken_for_a_block_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever shares the beginning is believed to compute all of the block."""

    def is_in_progress(self: Explainer, request: Request, index: int) -> bool:
        start = index * self._size
        return any(
            other.num_published <= index
            and other.salt == request.salt
            and other.prompt_len > start
            and other.token_ids[: start + 1] == request.token_ids[: start + 1]
            for other in self._running
        )

    monkeypatch.setattr(Explainer, "_is_in_progress", is_in_progress)


# ---- what is told of blocks and requests


@caught_by(KVMachine, SchedMachine)
def an_idle_block_is_still_counted_as_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def idled(self: BlockFacts, block_id: int) -> None:
        self.cached[self.tenants[block_id]] += 1
        self.idle_ds[block_id] = self.now_ds

    monkeypatch.setattr(BlockFacts, "idled", idled)


@caught_by(KVMachine, SchedMachine)
def an_evicted_block_stays_on_its_old_account(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockFacts.took

    def took(self: BlockFacts, block_ids: list[int], owner: int, tenant: int, position: int) -> None:
        old = [self.tenants[block_id] for block_id in block_ids]
        original(self, block_ids, owner, tenant, position)
        for block_id, index in zip(block_ids, old, strict=True):
            self.tenants[block_id] = index or tenant

    monkeypatch.setattr(BlockFacts, "took", took)


@caught_by(KVMachine, SchedMachine)
def a_chain_that_comes_back_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    original = KVManager._join

    def join(self: KVManager, published: Published) -> None:
        original(self, published._replace(reunited=[]))

    monkeypatch.setattr(KVManager, "_join", join)


@caught_by(SchedMachine)
def a_new_parent_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def follows(self: BlockFacts, block_id: int, parent: int) -> None:
        self.parents[block_id] = parent

    monkeypatch.setattr(BlockFacts, "follows", follows)


@caught_by(SchedMachine)
def a_block_given_back_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockPool.drop

    def drop(self: BlockPool, block_id: int) -> None:
        dirty, self.facts.dirty = self.facts.dirty, None
        original(self, block_id)
        self.facts.dirty = dirty

    monkeypatch.setattr(BlockPool, "drop", drop)


@caught_by(SchedMachine)
def a_report_is_said_with_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sched.ledger._hand_over_report", lambda request: request.report)


@caught_by(SchedMachine)
def only_the_leader_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Roster.fork

    def fork(self: Roster, leader: Request) -> None:
        followers = list(leader.followers)
        original(self, leader)
        for follower in followers:
            follower.report = None

    monkeypatch.setattr(Roster, "fork", fork)


@caught_by(SchedMachine)
def an_admission_after_a_preemption_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def account(self: Scheduler, request: Request, hit: Any) -> None:
        report = self.kv.account(request, hit)
        request.report = report if request.explain else None
        request.cached_tokens = hit.tokens
        self.tally.admitted(request, hit.tokens)

    monkeypatch.setattr(Scheduler, "_account", account)


@caught_by(SchedMachine)
def the_last_token_is_on_nobodys_account(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tally.ended

    def ended(self: Tally, request: Request, reason: FinishReason) -> None:
        original(self, request, reason)
        request.account.generated_tokens -= reason is FinishReason.LENGTH and request.max_output > 0

    monkeypatch.setattr(Tally, "ended", ended)


# ---- the scheduler


@caught_by(SchedMachine)
def an_abort_in_prefill_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is gone, its blocks are not."""
    original = Roster._vacate

    def vacate(self: Roster, request: Request) -> None:
        if 0 < request.computed < request.prompt_len:
            request.block_ids, request.copy_source = [], None
        original(self, request)

    monkeypatch.setattr(Roster, "_vacate", vacate)


@caught_by(SchedMachine)
def the_rows_of_waiting_followers_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def vacate(self: Roster, request: Request) -> None:
        self._kv.release(request)
        if request.row >= 0:
            self._free_rows.append(request.row)
        request.row, request.started = -1, False

    monkeypatch.setattr(Roster, "_vacate", vacate)


@caught_by(SchedMachine)
def the_budget_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def grant(self: StepBudget, wanted: int) -> int:
        granted = min(wanted, self.left + 1)
        self.left = max(self.left - granted, 0)
        return granted

    monkeypatch.setattr(StepBudget, "grant", grant)


@caught_by(SchedMachine)
def the_oldest_is_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    def reserve(self: Scheduler, request: Request, total: int, draft: StepDraft) -> tuple[int, ...] | None:
        while (new_block_ids := self.kv.reserve(request, total)) is None:
            victim = self.roster.running[0]
            draft.remove(victim)
            draft.preempted = True
            self._preempt(victim)
            if victim is request:
                return None
        return new_block_ids

    monkeypatch.setattr(Scheduler, "_reserve", reserve)


@caught_by(SchedMachine)
def a_late_result_reaches_the_next_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token sampled before a preemption or an end is delivered after it."""

    def is_current(part: Planned) -> bool:
        return part.request.status is not Status.FINISHED

    monkeypatch.setattr(Planned, "is_current", property(is_current))


@caught_by(SchedMachine)
def a_preempted_request_stays_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepDraft, "remove", lambda self, request: None)


@caught_by(SchedMachine)
def a_preempted_request_goes_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Queue.push

    def push(self: Queue, request: Request) -> None:
        if request.preemptions:
            self._requests.append(request)
        else:
            original(self, request)

    monkeypatch.setattr(Queue, "push", push)


@caught_by(SchedMachine)
def the_queue_ignores_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sched.queue.by_order", lambda request: request.order[1])


@caught_by(SchedMachine)
def the_youngest_is_preempted_whatever_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sched.roster.by_order", lambda request: request.order[1])


@caught_by(SchedMachine)
def larger_is_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Priorities as other servers have them."""
    for user in ("queue", "roster"):
        monkeypatch.setattr(
            f"engine.sched.{user}.by_order", lambda request: (-request.order[0], request.order[1])
        )


@caught_by(SchedMachine)
def tokens_in_flight_survive_a_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, request: Request) -> None:
        in_flight = request.in_flight
        original(self, request)
        request.in_flight = in_flight

    monkeypatch.setattr(Scheduler, "_preempt", preempt)


@caught_by(SchedMachine)
def tokens_in_flight_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request one token short of its limit is scheduled once too often."""
    monkeypatch.setattr(Request, "remaining", property(lambda self: self.known - self.computed))


@caught_by(SchedMachine)
def an_unseen_step_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are published as soon as they are planned, before they are known to be good."""
    original = Scheduler._extend

    def extend(self: Scheduler, request: Request, wanted: int, draft: StepDraft) -> None:
        original(self, request, wanted, draft)
        if request.status is Status.RUNNING:
            request.confirmed = min(request.computed, len(request.token_ids))
            self.kv.commit(request)

    monkeypatch.setattr(Scheduler, "_extend", extend)


@caught_by(SchedMachine)
def an_end_is_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    original = EngineCore.abort

    def abort(self: EngineCore, request_id: str, index: int | None = None) -> None:
        choices = self.scheduler._ledger.choices(request_id)
        original(self, request_id, index)
        for choice in choices:
            if choice.status is Status.FINISHED:
                outputs = self.scheduler._ledger._outputs
                outputs.append(outputs[-1]._replace(index=choice.index))

    monkeypatch.setattr(EngineCore, "abort", abort)


@caught_by(SchedMachine)
def logits_that_are_not_finite_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scheduler._see

    def see(self: Scheduler, request: Any, sequence: Any, token_id: int | None, logprob: Any) -> None:
        original(self, request, sequence, token_id if token_id is None else abs(token_id), logprob)

    monkeypatch.setattr(Scheduler, "_see", see)


@caught_by(SchedMachine)
def the_last_token_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scheduler._end

    def end(
        self: Scheduler,
        request: Request,
        reason: FinishReason,
        token_id: int | None = None,
        *rest: Any,
        **named: Any,
    ) -> None:
        original(self, request, reason, None, *rest, **named)

    monkeypatch.setattr(Scheduler, "_end", end)


@caught_by(SchedMachine)
def a_mean_is_made_of_half_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean reads the prefix cache, which has no hidden states."""

    def reads_prefix(self: KVManager, request: Request) -> bool:
        return self.prefix_caching and request.prompt_logprobs is None

    monkeypatch.setattr(KVManager, "reads_prefix", reads_prefix)


@caught_by(SchedMachine)
def a_vector_that_is_not_finite_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the executor left out is made up."""
    original = Scheduler._end_prompt

    def end_prompt(self: Scheduler, request: Request) -> None:
        request.embedding = request.embedding or b"-"
        original(self, request)

    monkeypatch.setattr(Scheduler, "_end_prompt", end_prompt)


# ---- the tests


@pytest.mark.parametrize("machine", [KVMachine, SchedMachine])
def test_without_a_mutation_they_pass(machine: Machine) -> None:
    run_machine(machine, CLEAN_EXAMPLES, STEPS, shrink=False)


@pytest.mark.parametrize(("mutate", "machine"), mutations)
def test_mutation_is_caught(mutate: Patch, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017  whatever the machine or the engine noticed
        run_machine(machine, EXAMPLES, STEPS, shrink=False)


def test_enough_mutations() -> None:
    assert len({mutation.values[0] for mutation in mutations}) >= 45
