"""The core by example: depth, seeds, failures of the executor, and what it says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.core import EngineCore, choice_seed
from engine.errors import InvalidRequest
from engine.plan import StepPlan
from engine.sched import show
from engine.stats import BUCKETS
from engine.types import FinishReason, SamplingParams, TokenOutput
from engine.views import BlockDetail, BlockView, CacheReport, CacheScope, EvictionCause, MissReason
from tests.helpers.audit import check_core
from tests.helpers.fake_executor import FakeExecutor, draw, expected_choice, make_config

STEADY = SamplingParams(seed=1, max_tokens=6, ignore_eos=True)


def make(**options: int) -> tuple[EngineCore, FakeExecutor]:
    config = make_config(**options)  # type: ignore[arg-type]
    executor = FakeExecutor(config)
    return EngineCore(config, executor), executor


def finish(core: EngineCore) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while core.has_work:
        outputs += core.step()
        check_core(core)
    return outputs


class TestDepth:
    def test_one_step_at_a_time_each_step_brings_a_token(self) -> None:
        core, executor = make(steps_ahead=1)
        core.add("r", [2, 3], STEADY)
        assert [len(core.step()) for _ in range(6)] == [1] * 6
        assert not core.has_work and executor.steps == 6

    def test_one_step_ahead_tokens_come_one_step_late(self) -> None:
        core, executor = make(steps_ahead=2)
        core.add("r", [2, 3], STEADY)
        assert [len(core.step()) for _ in range(7)] == [0] + [1] * 6
        assert not core.has_work
        assert executor.steps == 6, "a length is known ahead: no row is wasted on it"

    def test_a_stop_seen_late_costs_one_row_whose_result_is_dropped(self) -> None:
        core, executor = make(steps_ahead=2)
        stop = draw(1, [2, 3])
        core.add("r", [2, 3], SamplingParams(seed=1, stop_token_ids=(stop,), max_tokens=9))
        outputs = finish(core)
        assert [o.token_id for o in outputs] == [stop]
        assert executor.steps == 2 and core.kv.pool.num_in_use == 0

    def test_the_token_in_flight_is_not_named_in_the_plan(self) -> None:
        core, _ = make(steps_ahead=2)
        core.add("r", [2, 3], STEADY)
        plans = [core.scheduler.schedule() for _ in range(3)]
        assert [plan.sequences[0].token_ids for plan in plans if plan] == [(2, 3), (), ()]

    @pytest.mark.parametrize("ahead", [1, 2, 3])
    def test_the_depth_does_not_change_the_text(self, ahead: int) -> None:
        core, _ = make(steps_ahead=ahead, block_size=1, num_blocks=14)
        for name, prompt in (("a", [2, 3]), ("b", [4, 5]), ("c", [6])):
            core.add(name, prompt, STEADY)
        outputs = finish(core)
        for name, prompt in (("a", [2, 3]), ("b", [4, 5]), ("c", [6])):
            said = [o.token_id for o in outputs if o.request_id == name]
            assert said == expected_choice(prompt, STEADY, 0, 6).token_ids

    def test_a_request_aborted_in_flight_is_not_heard_of_again(self) -> None:
        core, _ = make(steps_ahead=2)
        core.add("r", [2, 3], STEADY)
        core.step()
        core.abort("r")
        core.add("r", [4, 5], STEADY)  # the same name, while the old step is under way
        outputs = finish(core)
        assert outputs[0].finish_reason is FinishReason.ABORT
        assert [o.token_id for o in outputs[1:]] == expected_choice([4, 5], STEADY, 0, 6).token_ids


class TestSeeds:
    def test_the_first_choice_has_the_requests_own_seed(self) -> None:
        assert choice_seed(42, 0) == 42 and choice_seed(-5, 0) == -5

    def test_other_choices_are_well_apart_and_fit_64_bits(self) -> None:
        seeds = [
            choice_seed(seed, index) for seed in (0, 1, 2, -1, 2**63 - 1, -(2**63)) for index in range(20)
        ]
        assert len(set(seeds)) == len(seeds)
        assert all(-(2**63) <= seed < 2**63 for seed in seeds)

    def test_without_a_seed_each_request_draws_its_own(self) -> None:
        core, _ = make()
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        core.add("a", [2, 3], params)
        core.add("b", [2, 3], params)
        outputs = finish(core)
        assert len({tuple(o.token_id for o in outputs if o.request_id == name) for name in "ab"}) == 2


class TestExecutorFailure:
    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("ahead", [1, 2])
    def test_nothing_is_lost_when_a_step_fails(self, late: bool, ahead: int) -> None:
        core, executor = make(steps_ahead=ahead, max_num_batched_tokens=6)
        core.add("a", range(2, 12), STEADY)
        core.add("b", [2, 3], SamplingParams(n=2, seed=4, max_tokens=5, ignore_eos=True))
        outputs: list[TokenOutput] = []
        for turn in range(3):
            outputs += core.step()
            if late:
                executor.fail_next_result = MemoryError("device")
            else:
                executor.fail_next = MemoryError("device")
            with pytest.raises(MemoryError):
                for _ in range(3):
                    outputs += core.step()
            assert core.kv.pool.num_in_use == 0 and core.snapshot().running == 0, f"turn {turn}"
            check_core(core)
        outputs += finish(core)
        for name, index, prompt, params in (
            ("a", 0, list(range(2, 12)), STEADY),
            ("b", 0, [2, 3], SamplingParams(seed=4, max_tokens=5, ignore_eos=True)),
            ("b", 1, [2, 3], SamplingParams(seed=4, max_tokens=5, ignore_eos=True)),
        ):
            said = [o.token_id for o in outputs if (o.request_id, o.index) == (name, index)]
            assert said == expected_choice(prompt, params, index, len(said)).token_ids
            assert len(said) == params.max_tokens

    def test_the_caller_may_give_up(self) -> None:
        core, executor = make()
        core.add("a", [2, 3], STEADY)
        executor.fail_next = RuntimeError("lost")
        with pytest.raises(RuntimeError):
            core.step()
        core.fail(None, "The device is gone.")
        (output,) = core.step()
        assert output.finish_reason is FinishReason.ERROR and output.error == "The device is gone."
        assert not core.has_work


class TestSnapshot:
    def test_an_idle_engine_says_so(self) -> None:
        core, _ = make(num_blocks=9)
        now = core.snapshot()
        assert (now.blocks_total, now.blocks_free, now.running, now.waiting) == (8, 8, 0, 0)
        assert now.requests_finished == {"stop": 0, "length": 0, "abort": 0, "error": 0}
        assert set(now.evicted_blocks) == set(EvictionCause) and set(now.misses) == set(MissReason)
        assert set(now.histograms) == set(BUCKETS)
        assert not any(sum(histogram.counts) for histogram in now.histograms.values())
        assert core.step() == [] and not core.has_work

    def test_it_counts_what_happened(self) -> None:
        core, _ = make(num_blocks=17)
        core.add("a", range(2, 12), SamplingParams(n=2, seed=1, max_tokens=3, ignore_eos=True))
        core.step()
        core.step()
        now = core.snapshot()
        assert (now.steps, now.running, now.waiting) == (2, 2, 0)
        assert (now.blocks_in_use, now.blocks_shared) == (4, 2)
        assert now.tokens_held == 8 + 3 + 2
        finish(core)
        end = core.snapshot()
        assert end.generated_tokens == 6 and end.prompt_tokens == 10
        assert end.requests_finished["length"] == 2
        assert end.blocks_in_use == 0 and end.blocks_cached + end.blocks_free == end.blocks_total
        core.reset_prefix_cache()
        assert core.snapshot().blocks_cached == 0

    def test_a_leak_is_noticed_before_the_next_request_runs(self) -> None:
        core, _ = make()
        core.add("a", [2, 3], SamplingParams(max_tokens=1))
        core.kv.pool.take(1)
        with pytest.raises(AssertionError, match="still in use"):
            core.step()


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 500.0

    def __call__(self) -> float:
        return self.now_s


def make_timed(**options: int) -> tuple[EngineCore, Clock]:
    config = make_config(**options)  # type: ignore[arg-type]
    clock = Clock()
    return EngineCore(config, FakeExecutor(config), clock), clock


ANN, BOB = CacheScope("ann", b"a"), CacheScope("bob", b"b")


class TestTally:
    def test_queue_prefill_and_decode_are_timed(self) -> None:
        core, clock = make_timed(max_num_seqs=1)
        core.add("1", [2, 3], SamplingParams(seed=1, max_tokens=3, ignore_eos=True))
        core.add("2", [2, 3], SamplingParams(seed=1, max_tokens=1))
        totals = []
        while core.has_work:
            clock.now_s += 1.0
            core.step()
            totals.append([core.snapshot().histograms[name].total for name in ("queue_s", "decode_s")])
        assert totals == [[1.0, 0.0], [1.0, 0.0], [1.0, 2.0], [5.0, 2.0]]
        histograms = core.snapshot().histograms
        assert sum(histograms["queue_s"].counts) == sum(histograms["prefill_s"].counts) == 2
        assert sum(histograms["decode_s"].counts) == 2
        assert histograms["step_tokens"].total == 2 + 1 + 1 + 2

    def test_the_queue_ends_with_the_first_admission_also_after_a_preemption(self) -> None:
        core, clock = make_timed(block_size=1, num_blocks=13, max_num_batched_tokens=100)
        for name, prompt in (("1", [2, 3]), ("2", [4, 5])):
            core.add(name, prompt, SamplingParams(seed=3, max_tokens=8, ignore_eos=True))
        while core.has_work:
            core.step()
            clock.now_s += 1.0
        snapshot = core.snapshot()
        assert snapshot.preemptions >= 1
        for name in ("queue_s", "prefill_s", "decode_s"):
            assert sum(snapshot.histograms[name].counts) == 2
        assert snapshot.histograms["queue_s"].total == snapshot.histograms["prefill_s"].total == 0.0
        assert sum(snapshot.misses.values()) == 2

    def test_choices_are_one_request_of_which_each_decodes(self) -> None:
        core, _ = make_timed(num_blocks=65)
        core.add("1", range(2, 12), SamplingParams(n=3, seed=5, max_tokens=4, ignore_eos=True))
        finish(core)
        counts = {name: sum(data.counts) for name, data in core.snapshot().histograms.items()}
        assert [counts[name] for name in ("queue_s", "prefill_s", "decode_s")] == [1, 1, 3]

    def test_busy_is_the_time_in_steps(self) -> None:
        core, clock = make_timed()
        core.add("1", [2, 3], STEADY)
        forward = core._executor.forward

        def slow(plan: StepPlan) -> None:
            clock.now_s += 0.25
            forward(plan)

        core._executor.forward = slow  # type: ignore[method-assign]
        core.step()
        clock.now_s += 10.0
        core.step()
        snapshot = core.snapshot()
        assert (snapshot.busy_s, snapshot.histograms["step_s"].total) == (0.5, 0.5)

    def test_a_step_that_fails_was_busy_too(self) -> None:
        core, clock = make_timed()
        core.add("1", [2, 3], STEADY)

        def broken(plan: StepPlan) -> None:
            clock.now_s += 2.0
            raise MemoryError

        core._executor.forward = broken  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            core.step()
        assert core.snapshot().busy_s == 2.0

    def test_tenants_are_told_apart(self) -> None:
        core, _ = make_timed(num_blocks=65)
        for number, scope in enumerate([ANN, ANN, BOB], 1):
            core.add(str(number), range(2, 12), STEADY, scope)
            finish(core)
        core.add("4", range(2, 12), SamplingParams(n=2, max_tokens=2, ignore_eos=True), BOB)
        waiting = core.snapshot()
        assert (waiting.tenants["bob"].waiting, waiting.tenants["ann"].waiting) == (2, 0)
        core.step()
        now = core.snapshot()
        ann, bob = now.tenants["ann"], now.tenants["bob"]
        assert (ann.requests, ann.prompt_tokens, ann.hit_tokens, ann.generated_tokens) == (2, 20, 8, 12)
        assert (bob.requests, bob.prompt_tokens, bob.hit_tokens, bob.generated_tokens) == (2, 20, 8, 7)
        assert (bob.running, bob.waiting) == (2, 0)
        assert bob.blocks_in_use + ann.blocks_in_use == now.blocks_in_use
        assert ann.blocks_cached + bob.blocks_cached == now.blocks_cached
        assert now.cached_tokens == now.blocks_cached * 4


class TestExplain:
    def reports(self, outputs: list[TokenOutput], request_id: str) -> dict[int, list[CacheReport | None]]:
        found: dict[int, list[CacheReport | None]] = {}
        for output in outputs:
            if output.request_id == request_id:
                found.setdefault(output.index, []).append(output.cache)
        return found

    def test_nobody_is_told_unasked(self) -> None:
        core, _ = make()
        core.add("1", [2, 3], STEADY)
        assert not any(output.cache for output in finish(core))

    @pytest.mark.parametrize("ahead", [1, 2])
    def test_each_choice_is_told_once(self, ahead: int) -> None:
        core, _ = make(steps_ahead=ahead, num_blocks=65)
        core.add("1", range(2, 12), STEADY)
        finish(core)
        params = SamplingParams(n=3, seed=5, max_tokens=4, ignore_eos=True)
        core.add("2", range(2, 12), params, explain=True)
        reports = self.reports(finish(core), "2")
        assert len(reports) == 3
        for first, *rest in reports.values():
            assert first is not None and (first.prompt_tokens, first.reused_tokens) == (10, 8)
            assert rest == [None] * 3
        assert core.snapshot().misses[MissReason.PARTIAL_BLOCK] == 1, "it is one request"

    def test_a_preemption_does_not_change_what_is_told(self) -> None:
        core, executor = make(max_num_batched_tokens=6, num_blocks=65)
        core.add("1", range(2, 22), STEADY, explain=True)
        core.step()
        executor.fail_next = MemoryError()
        with pytest.raises(MemoryError):
            core.step()
        first, *rest = self.reports(finish(core), "1")[0]
        assert first is not None and first.reason is MissReason.NEVER_SEEN
        assert rest == [None] * 5
        assert sum(core.snapshot().misses.values()) == 1

    @pytest.mark.parametrize("prompt_logprobs", [None, 1])
    def test_without_output_it_is_told_all_the_same(self, prompt_logprobs: int | None) -> None:
        core, _ = make(num_blocks=65)
        params = SamplingParams(n=2, max_tokens=0, prompt_logprobs=prompt_logprobs)
        core.add("1", range(2, 12), params, explain=True)
        reports = self.reports(finish(core), "1")
        reason = MissReason.NEVER_SEEN if prompt_logprobs is None else MissReason.PROMPT_LOGPROBS
        assert [[r and r.reason for r in reports[index]] for index in (0, 1)] == [[reason], [reason]]

    def test_a_probe_says_what_a_request_would_be_told_and_counts_nothing(self) -> None:
        core, _ = make(num_blocks=65)
        core.add("1", range(2, 12), STEADY, ANN)
        finish(core)
        before = core.snapshot()
        report = core.probe(range(2, 30), ANN)
        assert (report.reused_tokens, report.prompt_tokens) == (8, 28)
        assert core.probe(range(2, 30), BOB).reused_tokens == 0
        with pytest.raises(InvalidRequest):
            core.probe([1.5], ANN)  # type: ignore[list-item]
        after = core.snapshot()
        assert (after.misses, after.prefix_queries) == (before.misses, before.prefix_queries)
        core.add("2", range(2, 30), STEADY, ANN, explain=True)
        assert finish(core)[0].cache == report


class TestViews:
    def busy(self) -> tuple[EngineCore, Clock]:
        """Request 1 cached two blocks; 2 runs on them, with a second choice, and 3 waits."""
        core, clock = make_timed(num_blocks=9, max_num_seqs=2)
        core.add("1", range(2, 10), SamplingParams(max_tokens=2, ignore_eos=True), ANN)
        finish(core)
        clock.now_s += 5.0
        params = SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True)
        core.add("2", [*range(2, 10), 40, 41], params, ANN)
        core.add("3", [30, 31], STEADY, BOB)
        core.step()
        core.step()
        return core, clock

    def test_each_block_has_its_state_owner_and_place(self) -> None:
        core, clock = self.busy()
        clock.now_s += 1.0
        page = core.cache_page()
        assert [view.block_id for view in page.blocks] == list(range(1, 9)) and page.next_block is None
        snapshot = core.snapshot()
        states = [view.state for view in page.blocks]
        assert states.count("free") == snapshot.blocks_free
        assert states.count("shared") == snapshot.blocks_shared == 2
        assert states.count("in_use") + 2 == snapshot.blocks_in_use
        head, following, *rest = (view for view in page.blocks if view.state != "free")
        assert (head.owner, head.holders, head.tenant, head.position) == ("1", ("2",), "ann", 0)
        assert (head.tokens, head.parent, head.age_s, head.idle_s) == (4, 0, 6.0, None)
        assert (following.parent, following.position) == (head.block_id, 1)
        assert len(head.digest) == 16 and head.digest != following.digest
        assert {(view.owner, view.position, view.tokens) for view in rest} == {("2", 2, 3), ("2", 2, 2)}

    def test_what_nobody_uses_is_cached_since_then(self) -> None:
        core, clock = self.busy()
        finish(core)
        clock.now_s += 2.5
        (head, *_) = core.cache_page(state="cached").blocks
        assert (head.holders, head.idle_s, head.tokens) == ((), 2.5, 4)

    def test_pages_go_on_where_the_last_one_ended(self) -> None:
        core, _ = self.busy()
        pages = [core.cache_page(1, 3), core.cache_page(4, 3), core.cache_page(7, 3)]
        assert [page.next_block for page in pages] == [4, 7, None]
        whole = core.cache_page(limit=8)
        assert whole.next_block is None
        assert sum((page.blocks for page in pages), ()) == whole.blocks
        shared = core.cache_page(limit=1, state="shared")
        assert len(shared.blocks) == 1 and shared.next_block is not None
        rest = core.cache_page(shared.next_block, 100, "shared")
        assert len(rest.blocks) == 1 and rest.next_block is None
        assert core.cache_page(99).blocks == () and core.cache_page(-5).blocks[0].block_id == 1
        with pytest.raises(InvalidRequest, match="state must be one of"):
            core.cache_page(state="idle")

    def test_a_large_pool_is_looked_through_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(show, "MAX_SCANNED_BLOCKS", 2)
        core, _ = self.busy()
        found, first = [], 1
        while first is not None:
            page = core.cache_page(first, 100, "free")
            found += [view.block_id for view in page.blocks]
            first = page.next_block
        assert len(found) == core.snapshot().blocks_free

    def test_a_block_has_its_tokens_and_what_goes_on_from_it(self) -> None:
        core, _ = self.busy()
        head, following, *tails = (view for view in core.cache_page().blocks if view.state != "free")
        detail = core.cache_block(head.block_id)
        assert detail is not None
        assert (detail.block, detail.token_ids, detail.children) == (
            head,
            (2, 3, 4, 5),
            (following.block_id,),
        )
        for tail in tails:
            detail = core.cache_block(tail.block_id)
            assert detail is not None and detail.token_ids[:2] == (40, 41)
            assert len(detail.token_ids) == tail.tokens
        free = core.cache_page(state="free").blocks[0]
        assert core.cache_block(free.block_id) == BlockDetail(BlockView(free.block_id, "free"))
        assert core.cache_block(0) is core.cache_block(9) is None

    def test_of_many_holders_and_children_a_few_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(show, "MAX_HOLDERS", 2)
        monkeypatch.setattr(show, "MAX_CHILDREN", 2)
        core, _ = make(num_blocks=65, max_num_seqs=8)
        core.add("0", range(2, 8), SamplingParams(max_tokens=2, ignore_eos=True))
        finish(core)
        for number in (1, 2, 3):
            prompt = [*range(2, 6), *[number + 20] * 5]
            core.add(str(number), prompt, SamplingParams(n=2, seed=1, max_tokens=8, ignore_eos=True))
        for _ in range(5):
            core.step()
        head = next(view for view in core.cache_page(state="shared").blocks if view.position == 0)
        assert head.holders == ("1", "2") and core.kv.pool.ref(head.block_id) == 6
        detail = core.cache_block(head.block_id)
        assert detail is not None and detail.block == head
        assert detail.children == core.kv.prefix.children_of(head.block_id)[:2]
        assert len(core.kv.prefix.children_of(head.block_id)) == 3

    def test_a_leaked_block_can_be_looked_at(self) -> None:
        core, _ = make()
        (block_id,) = core.kv.pool.take(1)
        detail = core.cache_block(block_id)
        assert detail is not None and (detail.block.state, detail.block.tokens) == ("in_use", 0)

    def test_a_reset_empties_what_nobody_uses(self) -> None:
        core, _ = self.busy()
        core.add("4", range(20, 29), SamplingParams(max_tokens=1), BOB)
        finish(core)
        cached = core.snapshot().blocks_cached
        core.add("5", range(2, 12), STEADY, ANN)
        core.step()
        now = core.snapshot()
        assert core.reset_prefix_cache() == now.blocks_cached < cached
        after = core.snapshot()
        assert (after.blocks_cached, after.blocks_in_use) == (0, now.blocks_in_use)
        assert after.evicted_blocks["reset"] >= now.blocks_cached
        finish(core)
        assert core.reset_prefix_cache() <= 1, "what was in use then is not published again"

    def test_lanes_say_what_each_choice_does(self) -> None:
        core, clock = make_timed(num_blocks=9, max_num_seqs=2, max_num_batched_tokens=6)
        core.add("1", range(2, 12), SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True), ANN)
        core.add("2", [30, 31], STEADY, BOB)
        clock.now_s += 1.0

        def phases() -> list[tuple[str, int, str, int]]:
            lanes = core.frame(True).lanes
            return [(lane.request_id, lane.index, lane.phase, lane.computed_tokens) for lane in lanes]

        queued = ("2", 0, "queued", 0)
        assert phases() == [("1", 0, "queued", 0), ("1", 1, "queued", 0), queued]
        core.step()
        assert phases() == [("1", 0, "prefill", 6), ("1", 1, "queued", 0), queued]
        core.step()
        assert phases() == [("1", 0, "decode", 10), ("1", 1, "prefill", 9), queued]
        core.step()
        assert phases() == [("1", 0, "decode", 11), ("1", 1, "decode", 10), queued]
        core._executor.fail_next = MemoryError()  # type: ignore[attr-defined]
        with pytest.raises(MemoryError):
            core.step()
        assert phases() == [("1", 0, "preempted", 0), ("1", 1, "preempted", 0), queued]
        core.step()
        (first, *_) = core.frame(True).lanes
        assert (first.phase, first.preemptions, first.tenant, first.age_s) == ("decode", 1, "ann", 1.0)
        assert (first.prompt_tokens, first.output_tokens, first.blocks) == (10, 3, 3)

    def test_lanes_show_priorities_in_their_order(self) -> None:
        core, _ = make(max_num_seqs=1, num_blocks=65)
        for number, priority in enumerate((0, 5, -5), 1):
            core.add(str(number), [2, 3], SamplingParams(max_tokens=4, priority=priority))
        assert [(lane.request_id, lane.priority) for lane in core.frame(True).lanes] == [
            ("3", -5),
            ("1", 0),
            ("2", 5),
        ]

    def test_lanes_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(show, "MAX_RUNNING_LANES", 2)
        monkeypatch.setattr(show, "MAX_WAITING_LANES", 1)
        core, _ = make(max_num_seqs=4, num_blocks=65)
        for number in range(1, 8):
            core.add(str(number), [number], STEADY)
        core.step()
        frame = core.frame(True)
        assert [lane.request_id for lane in frame.lanes] == ["1", "2", "5"]
        assert frame.lanes_left_out == 4


@pytest.mark.parametrize("prompt", [[1.5], ["a"], "text", [2**40], [-1], [None], []])
def test_a_prompt_must_be_token_ids(prompt: list[int]) -> None:
    core, _ = make()
    with pytest.raises(InvalidRequest):
        core.add("a", prompt, STEADY)
    assert not core.has_work


def test_salts_keep_tenants_apart() -> None:
    core, _ = make()
    core.add("a", range(2, 12), STEADY, CacheScope(salt=b"one"))
    finish(core)
    core.add("b", range(2, 12), STEADY, CacheScope(salt=b"two"))
    assert finish(core)[0].cached_tokens == 0
    core.add("c", range(2, 12), STEADY, CacheScope(salt=b"one"))
    assert finish(core)[0].cached_tokens == 8


def test_the_engines_seed_repeats_the_seeds_it_draws() -> None:
    def tokens(seed: int | None) -> list[int | None]:
        config = make_config()
        config = replace(config, model=replace(config.model, seed=seed))
        core = EngineCore(config, FakeExecutor(config))
        for i in range(2):
            core.add(f"r{i}", [1, 2, 3], SamplingParams(max_tokens=12, ignore_eos=True))
        return [output.token_id for output in finish(core)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)
