"""The scheduler by example: plans are looked at one at a time."""

from __future__ import annotations

import logging

import pytest

from engine.core import EngineCore
from engine.errors import InvalidRequest, Overloaded
from engine.plan import StepPlan
from engine.types import FinishReason, SamplingParams, TokenOutput
from tests.helpers.audit import check_core
from tests.helpers.fake_executor import FakeExecutor, Handle, draw, expected_choice, make_config

STEADY = SamplingParams(seed=1, max_tokens=6, ignore_eos=True)


class Recorder(FakeExecutor):
    """Keeps the plans."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.plans: list[StepPlan] = []

    def forward(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        super().forward(plan)


def make(**options: int) -> tuple[EngineCore, Recorder]:
    config = make_config(**options)  # type: ignore[arg-type]
    executor = Recorder(config)
    return EngineCore(config, executor), executor


def finish(core: EngineCore) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    for _ in range(1000):
        if not core.has_work:
            return outputs
        outputs += core.step()
        check_core(core)
    raise AssertionError("no end")


def tokens(outputs: list[TokenOutput], request_id: str, index: int = 0) -> list[int | None]:
    return [o.token_id for o in outputs if (o.request_id, o.index) == (request_id, index)]


def shape(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(s.row, s.start, s.num_tokens) for s in plan.sequences]


class TestOrder:
    def test_a_prompt_is_chunked_and_decodes_go_first(self) -> None:
        core, executor = make(max_num_batched_tokens=8, num_blocks=65)
        core.add("short", range(2, 7), STEADY)
        core.step()
        core.add("long", range(20, 40), STEADY)
        for _ in range(3):
            core.step()
        assert [shape(plan) for plan in executor.plans] == [
            [(0, 0, 5)],
            [(0, 5, 1), (1, 0, 7)],
            [(0, 6, 1), (1, 7, 7)],
            [(0, 7, 1), (1, 14, 6)],
        ]
        assert [s.samples for plan in executor.plans for s in plan.sequences if s.row == 1] == [
            False,
            False,
            True,
        ]

    @pytest.mark.parametrize("budget", [5, 6, 7, 8])
    def test_a_piece_of_a_prompt_is_never_a_single_token_where_that_matters(self, budget: int) -> None:
        core, executor = make(
            max_num_batched_tokens=budget, max_num_seqs=3, least_piece=2, num_blocks=65, prefix_caching=False
        )
        for length in (5, 12, 2, 9, 1, 17):
            core.add(str(length), range(2, 2 + length), STEADY)
        outputs = finish(core)
        assert all(len(tokens(outputs, str(length))) == 6 for length in (5, 12, 2, 9, 1, 17))
        singles = [s for plan in executor.plans for s in plan.sequences if s.num_tokens == 1]
        pieces = [s for plan in executor.plans for s in plan.sequences if s.num_tokens > 1]
        assert all(s.samples for s in singles) and sum(not s.samples for s in pieces) > 2

    def test_admission_stops_at_the_budget_and_the_rows(self) -> None:
        core, executor = make(max_num_batched_tokens=9, max_num_seqs=2, num_blocks=65)
        for first, name in enumerate("abc", start=2):
            core.add(name, range(first, first + 6), STEADY)
        core.step()
        core.step()
        assert [shape(plan) for plan in executor.plans] == [[(0, 0, 6), (1, 0, 3)], [(0, 6, 1), (1, 3, 3)]]
        assert core.snapshot().running == 2 and core.snapshot().waiting == 1

    def test_admission_leaves_room_for_those_who_are_behind(self) -> None:
        core, _ = make(max_num_batched_tokens=4, num_blocks=9)
        brief = SamplingParams(max_tokens=2, ignore_eos=True)
        core.add("long", range(2, 26), brief)  # 6 of 8 blocks, one per step
        core.add("next", range(30, 42), brief)  # would fit now, and cost somebody his blocks later
        core.step()
        assert core.snapshot().running == 1 and core.kv.pool.num_available == 7
        finish(core)
        assert core.snapshot().preemptions == 0

    def test_prompts_that_begin_alike_and_come_together_are_computed_once(self) -> None:
        core, executor = make(max_num_batched_tokens=16, max_num_seqs=8, num_blocks=129, vocab_size=500)
        for name in range(6):
            core.add(str(name), [*range(20, 60), 100 + name, 200 + name], STEADY)
        outputs = finish(core)
        cached = {o.request_id: o.cached_tokens for o in outputs}
        assert cached == {"0": 0, **{str(name): 40 for name in range(1, 6)}}
        assert min(s.start for plan in executor.plans for s in plan.sequences if s.row) == 40

    def test_nobody_waits_for_the_smaller_part_of_a_prompt(self) -> None:
        core, executor = make(num_blocks=129, vocab_size=500)
        core.add("first", [*range(20, 36), *range(100, 110)], STEADY)
        core.add("alike", [*range(20, 36), *range(200, 218)], STEADY)  # 16 of 34 tokens
        core.step()
        assert shape(executor.plans[0]) == [(0, 0, 26), (1, 0, 34)]

    def test_who_waits_for_a_prefix_goes_on_when_it_will_not_come(self) -> None:
        core, _ = make(num_blocks=129, vocab_size=500)
        core.add("first", range(20, 56), STEADY)
        core.add("second", [*range(20, 52), 100], STEADY)
        core.scheduler.schedule()
        assert core.scheduler.num_waiting == 1
        core.abort("first")
        plan = core.scheduler.schedule()
        assert plan is not None and shape(plan) == [(0, 0, 33)]

    def test_a_second_request_with_the_same_prompt_starts_from_the_cache(self) -> None:
        core, executor = make(num_blocks=65)
        core.add("one", range(2, 12), STEADY)
        core.step()
        core.add("two", range(2, 12), STEADY)
        outputs = finish(core)
        assert shape(executor.plans[1]) == [(0, 10, 1), (1, 8, 2)]
        assert {o.cached_tokens for o in outputs if o.request_id == "two"} == {8}
        snapshot = core.snapshot()
        assert (snapshot.prefix_query_tokens, snapshot.prefix_hit_tokens, snapshot.prompt_tokens) == (
            20,
            8,
            20,
        )


class TestLongPrompts:
    """What one of them costs in a step is bounded, so that others' next tokens come in time."""

    def make(self, num_blocks: int = 65) -> tuple[EngineCore, Recorder]:
        core, executor = make(num_blocks=num_blocks)
        core.kv.blocks_per_step = 2
        return core, executor

    def test_it_is_hashed_in_pieces_and_then_looked_up(self) -> None:
        core, executor = self.make()
        core.add("short", [2, 3], STEADY)
        core.step()
        core.add("long", range(2, 24), STEADY)  # 5 full blocks
        outputs = finish(core)
        assert [len(plan.sequences) for plan in executor.plans[:5]] == [1, 1, 1, 1, 2]
        assert tokens(outputs, "long") == expected_choice([*range(2, 24)], STEADY, 0, 6).token_ids

    def test_alone_it_waits_for_nobody_but_itself(self) -> None:
        core, executor = self.make()
        core.add("long", range(2, 24), STEADY)
        assert [core.step() for _ in range(3)] == [[]] * 3 and not executor.plans
        assert tokens(finish(core), "long") == expected_choice([*range(2, 24)], STEADY, 0, 6).token_ids

    def test_it_is_published_and_given_back_in_pieces(self) -> None:
        core, _ = self.make()
        brief = SamplingParams(max_tokens=1, ignore_eos=True)
        core.add("long", range(2, 24), brief)
        while not any(output.finish_reason for output in core.step()):
            check_core(core)
        seen = []
        while core.has_work:
            seen.append((core.kv.pool.num_in_use, len(core.kv.prefix)))
            core.step()
            check_core(core)
        assert seen == [(6, 2), (6, 4), (5, 5), (3, 5), (1, 5)]
        assert core.kv.pool.num_in_use == 0 and core.kv.pool.num_idle == 5

    def test_what_it_has_still_to_give_back_is_given_at_once_to_who_needs_it(self) -> None:
        core, _ = self.make(num_blocks=9)
        core.add("long", range(2, 24), SamplingParams(max_tokens=1, ignore_eos=True))
        core.add("other", [2, 3], SamplingParams(max_tokens=28, ignore_eos=True))
        outputs = finish(core)
        assert len(tokens(outputs, "other")) == 28 and core.snapshot().preemptions == 0

    def test_a_long_hit_is_adopted_in_pieces(self) -> None:
        core, executor = self.make()
        core.add("first", range(2, 24), STEADY)
        finish(core)
        executor.plans.clear()
        core.add("short", [2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
        core.step()
        core.add("again", range(2, 24), STEADY)
        outputs = finish(core)
        assert [len(plan.sequences) for plan in executor.plans[:7]] == [1, 1, 1, 1, 1, 1, 2]
        assert shape(executor.plans[6])[1] == (1, 20, 2)
        assert {o.cached_tokens for o in outputs if o.request_id == "again"} == {20}
        assert tokens(outputs, "again") == expected_choice([*range(2, 24)], STEADY, 0, 6).token_ids

    def test_a_hit_that_is_forgotten_meanwhile_is_computed(self) -> None:
        core, executor = self.make()
        core.add("first", range(2, 24), STEADY)
        finish(core)
        core.add("again", range(2, 24), STEADY)
        while core.snapshot().running == 0:
            core.step()
        executor.plans.clear()
        core.reset_prefix_cache()
        outputs = finish(core)
        assert shape(executor.plans[0]) == [(0, 8, 14)]
        assert {o.cached_tokens for o in outputs if o.request_id == "again"} == {8}
        assert tokens(outputs, "again") == expected_choice([*range(2, 24)], STEADY, 0, 6).token_ids


class TestPriority:
    def test_the_smallest_is_admitted_first_and_equals_by_arrival(self) -> None:
        core, _ = make(max_num_seqs=1, num_blocks=65)
        for name, priority in [("a", 1), ("b", 0), ("c", -1), ("d", 0)]:
            core.add(name, [2, 3], SamplingParams(max_tokens=2, ignore_eos=True, priority=priority))
        ended = [output.request_id for output in finish(core) if output.finish_reason]
        assert ended == ["c", "b", "d", "a"]

    def test_a_waiting_one_does_not_push_out_a_running_one(self) -> None:
        core, _ = make(max_num_seqs=1, num_blocks=65)
        core.add("running", [2, 3], SamplingParams(max_tokens=4, ignore_eos=True, priority=9))
        core.step()
        core.add("urgent", [2, 3], SamplingParams(max_tokens=1, priority=-9))
        ended = [output.request_id for output in finish(core) if output.finish_reason]
        assert ended == ["running", "urgent"] and core.snapshot().preemptions == 0

    @pytest.mark.parametrize(("first", "second", "victim"), [(0, 0, "b"), (0, 1, "b"), (1, 0, "a")])
    def test_the_largest_is_preempted_and_the_youngest_of_equals(
        self, first: int, second: int, victim: str
    ) -> None:
        core, _ = make(block_size=1, num_blocks=9, max_num_batched_tokens=100)
        for name, priority in (("a", first), ("b", second)):
            core.add(name, [2, 3], SamplingParams(max_tokens=6, ignore_eos=True, priority=priority))
        while not core.snapshot().preemptions:
            core.step()
        assert [request.request_id for request in core.scheduler.roster.waiting] == [victim]
        finish(core)

    def test_who_was_preempted_waits_behind_those_of_a_smaller_one(self) -> None:
        core, _ = make(block_size=1, num_blocks=9, max_num_batched_tokens=100)
        for name, priority in (("a", 0), ("b", 1)):
            core.add(name, [2, 3], SamplingParams(max_tokens=6, ignore_eos=True, priority=priority))
        while not core.snapshot().preemptions:
            core.step()
        core.add("c", [2, 3], SamplingParams(max_tokens=6, ignore_eos=True, priority=1))
        core.add("d", [2, 3], SamplingParams(max_tokens=6, ignore_eos=True))
        assert [request.request_id for request in core.scheduler.roster.waiting] == ["d", "b", "c"]
        finish(core)


class TestPreemption:
    def test_the_youngest_gives_way_and_nothing_is_lost(self) -> None:
        core, _ = make(block_size=1, num_blocks=13, max_num_batched_tokens=100)
        params = SamplingParams(seed=3, max_tokens=8, ignore_eos=True)
        core.add("old", [2, 3], params)
        core.add("young", [4, 5], params)
        oldest = None
        outputs = []
        while core.has_work:
            oldest = oldest or next(iter(core.scheduler.running), None)
            outputs += core.step()
            check_core(core)
        assert oldest is not None and oldest.preemptions == 0
        assert core.snapshot().preemptions >= 1
        assert tokens(outputs, "old") == expected_choice([2, 3], params, 0, 8).token_ids
        assert tokens(outputs, "young") == expected_choice([4, 5], params, 0, 8).token_ids

    def test_nobody_is_admitted_in_a_step_that_preempted(self) -> None:
        core, executor = make(block_size=1, num_blocks=9, max_num_batched_tokens=100)
        core.add("old", [2, 3], SamplingParams(max_tokens=6, ignore_eos=True))
        core.add("young", [4, 5], SamplingParams(max_tokens=6, ignore_eos=True))
        while not core.snapshot().preemptions:
            core.step()
        assert len(executor.plans[-1].sequences) == 1 and not executor.plans[-1].row_starts
        assert core.snapshot().waiting == 1

    def test_recomputed_tokens_leave_out_what_the_cache_kept(self) -> None:
        core, _ = make(block_size=2, num_blocks=9, max_num_batched_tokens=100)
        core.add("old", [2, 3, 4], SamplingParams(max_tokens=12, ignore_eos=True))
        core.add("young", [5, 6, 7, 8], SamplingParams(max_tokens=8, ignore_eos=True))
        finish(core)
        snapshot = core.snapshot()
        assert snapshot.preemptions >= 1
        assert 0 < snapshot.recomputed_tokens < 14 * snapshot.preemptions

    def test_who_is_preempted_after_he_was_planned_leaves_the_plan(self) -> None:
        """Who is last in order is further than who is first, because the first came later."""
        core, executor = make(block_size=1, num_blocks=16, max_num_batched_tokens=6)
        params = SamplingParams(max_tokens=6, ignore_eos=True, seed=2, priority=1)
        core.add("early", [8, 9], params)
        outputs = core.step()
        core.add("urgent", range(10, 22), SamplingParams(max_tokens=1))
        outputs += finish(core)
        assert [shape(plan) for plan in executor.plans[:4]] == [
            [(0, 0, 2)],
            [(0, 2, 1), (1, 0, 5)],
            [(0, 3, 1), (1, 5, 5)],
            [(1, 10, 2)],  # the early one had been planned with one token
        ]
        assert core.snapshot().preemptions == 1
        assert tokens(outputs, "early") == expected_choice([8, 9], params, 0, 6).token_ids

    def test_if_the_oldest_cannot_be_held_alone_it_fails_instead_of_waiting_forever(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        core, _ = make(num_blocks=3)
        core.add("r", [2, 3], STEADY)
        core.kv.pool.take(2)  # a leak, as a bug elsewhere would leave
        (request,) = core.scheduler.roster.waiting
        core.scheduler.roster.begin(request, core.kv.match(request))
        (output,) = core.step()
        assert output.finish_reason is FinishReason.ERROR
        assert "cannot hold the first" in caplog.text


class TestCheck:
    def test_rows_are_audited_too(self) -> None:
        core, _ = make()
        check_core(core)
        core.scheduler.roster._free_rows.pop()
        with pytest.raises(AssertionError, match="rows"):
            check_core(core)

    def test_nobody_stays_behind_after_his_end(self) -> None:
        core, _ = make()
        core.add("r", [2, 3], STEADY)
        (request,) = core.scheduler.roster.waiting
        finish(core)
        core.scheduler.roster.waiting.push(request)
        with pytest.raises(AssertionError, match="still has a place"):
            check_core(core)


class TestChoices:
    def test_followers_compute_only_the_last_prompt_token(self) -> None:
        core, executor = make(num_blocks=65)
        params = SamplingParams(n=3, seed=5, max_tokens=4, ignore_eos=True)
        prompt = list(range(2, 12))
        core.add("r", prompt, params)
        outputs = finish(core)
        first, second = executor.plans[:2]
        assert shape(first) == [(0, 0, 10)] and first.block_copies == ()
        assert shape(second) == [(0, 10, 1), (1, 9, 1), (2, 9, 1)]
        tail = executor.plans[0].sequences[0].new_block_ids[2]
        assert [source for source, _ in second.block_copies] == [tail, tail]
        for index in range(3):
            assert tokens(outputs, "r", index) == expected_choice(prompt, params, index, 4).token_ids
        assert len({tuple(tokens(outputs, "r", index)) for index in range(3)}) == 3

    def test_all_rows_must_be_free(self) -> None:
        core, _ = make(max_num_seqs=3, num_blocks=65)
        core.add("one", [2, 3], STEADY)
        core.step()
        core.add("three", [2, 3], SamplingParams(n=3, max_tokens=2))
        core.step()
        assert core.snapshot().running == 1 and core.snapshot().waiting == 3
        finish(core)

    def test_more_choices_than_rows_are_refused(self) -> None:
        core, _ = make(max_num_seqs=3)
        with pytest.raises(InvalidRequest, match="n is 4"):
            core.add("r", [2], SamplingParams(n=4))

    @pytest.mark.parametrize("steps", [0, 1, 2])
    def test_aborting_the_leader_leaves_its_work_to_a_follower(self, steps: int) -> None:
        core, _ = make(max_num_batched_tokens=4, num_blocks=65)
        params = SamplingParams(n=2, seed=5, max_tokens=4, ignore_eos=True)
        prompt = list(range(2, 12))
        core.add("r", prompt, params)
        for _ in range(steps):
            core.step()
        core.abort("r", 0)
        outputs = finish(core)
        assert [o.finish_reason for o in outputs if o.index == 0] == [FinishReason.ABORT]
        assert tokens(outputs, "r", 1) == expected_choice(prompt, params, 1, 4).token_ids
        assert core.snapshot().preemptions == 0

    def test_aborting_a_waiting_follower_gives_its_row_back(self) -> None:
        core, _ = make(max_num_batched_tokens=4, max_num_seqs=2, num_blocks=65)
        core.add("r", range(2, 12), SamplingParams(n=2, max_tokens=2))
        core.step()
        core.abort("r", 1)
        core.add("other", [2], SamplingParams(max_tokens=1))
        check_core(core)
        for _ in range(3):
            core.step()
        assert core.snapshot().running + core.snapshot().requests_finished["length"] == 2
        finish(core)


class TestEnds:
    def test_a_stop_token_is_reported_with_its_id(self) -> None:
        core, _ = make()
        stop = draw(7, [2, 3])
        core.add("r", [2, 3], SamplingParams(seed=7, stop_token_ids=(stop,), ignore_eos=True))
        (output,) = finish(core)
        assert output[:5] == ("r", 0, stop, FinishReason.STOP, stop)

    def test_no_tokens_wanted(self) -> None:
        core, executor = make()
        core.add("r", [2, 3], SamplingParams(max_tokens=0, n=2))
        outputs = finish(core)
        assert sorted(o.index for o in outputs) == [0, 1]
        assert all(o.token_id is None and o.finish_reason is FinishReason.LENGTH for o in outputs)
        assert executor.plans == []

    @pytest.mark.parametrize("ahead", [1, 2])
    @pytest.mark.parametrize("max_tokens", [0, 3])
    def test_prompt_logprobs_are_collected_over_chunks(self, max_tokens: int, ahead: int) -> None:
        core, executor = make(max_num_batched_tokens=4, steps_ahead=ahead)
        prompt = list(range(2, 12))
        core.add("r", prompt, SamplingParams(max_tokens=max_tokens, prompt_logprobs=1, ignore_eos=True))
        outputs = finish(core)
        first = outputs[0].prompt_logprobs
        assert first is not None and first[0] is None
        assert [entry.token_id for entry in first[1:] if entry] == prompt[1:]
        assert all(output.prompt_logprobs is None for output in outputs[1:])
        assert len(outputs) == max(max_tokens, 1) and outputs[-1].finish_reason is FinishReason.LENGTH
        assert any(s.samples for plan in executor.plans for s in plan.sequences) == (max_tokens > 0)

    def test_prompt_logprobs_start_again_after_a_preemption(self) -> None:
        core, _ = make(max_num_batched_tokens=4)
        prompt = list(range(2, 12))
        core.add("r", prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
        core.step()
        core.scheduler.restart()
        core._in_flight.clear()
        (output,) = finish(core)
        assert output.prompt_logprobs is not None
        assert [entry.token_id for entry in output.prompt_logprobs[1:] if entry] == prompt[1:]

    def test_aborts_end_everything_at_once(self) -> None:
        core, _ = make(max_num_batched_tokens=4, num_blocks=65)
        core.add("running", range(2, 12), STEADY)
        core.step()
        core.add("waiting", range(2, 12), SamplingParams(n=2, max_tokens=3))
        for request_id in ("running", "waiting", "unknown"):
            core.abort(request_id)
            check_core(core)
        assert core.kv.pool.num_in_use == 0 and core.has_work
        outputs = finish(core)
        assert sorted((o.request_id, o.index) for o in outputs) == [
            ("running", 0),
            ("waiting", 0),
            ("waiting", 1),
        ]
        assert all(o.finish_reason is FinishReason.ABORT for o in outputs)

    def test_fail_ends_one_or_all_with_the_message(self) -> None:
        core, _ = make()
        for name in "abc":
            core.add(name, [2, 3], STEADY)
        core.step()
        core.fail("a", "first")
        core.fail(None, "all")
        errors = {o.request_id: o.error for o in finish(core) if o.finish_reason}
        assert errors == {"a": "first", "b": "all", "c": "all"}


class TestFaults:
    def test_logits_that_are_not_finite_end_one_choice_and_cache_nothing(self) -> None:
        core, executor = make(num_blocks=65)
        bad, good = list(range(2, 12)), list(range(20, 30))
        executor.broken.add((9, len(bad)))
        core.add("bad", bad, SamplingParams(seed=9, max_tokens=4))
        core.add("good", good, STEADY)
        outputs = finish(core)
        (end,) = [o for o in outputs if o.request_id == "bad"]
        assert end.finish_reason is FinishReason.ERROR and end.token_id is None and end.error
        assert tokens(outputs, "good") == expected_choice(good, STEADY, 0, 6).token_ids
        core.add("again", bad, STEADY)
        assert finish(core)[0].cached_tokens == 0
        core.add("good again", good, STEADY)
        assert finish(core)[0].cached_tokens == 8

    def test_what_was_cached_before_the_fault_stays(self) -> None:
        core, executor = make(num_blocks=65)
        executor.broken.add((9, 14))
        core.add("bad", range(2, 12), SamplingParams(seed=9, max_tokens=8, ignore_eos=True))
        outputs = finish(core)
        assert len(outputs) == 5 and outputs[-1].finish_reason is FinishReason.ERROR
        core.add("again", range(2, 12), STEADY)
        assert finish(core)[0].cached_tokens == 8

    @pytest.mark.parametrize("moment", ["match", "reserve", "commit"])
    def test_an_exception_in_one_request_ends_only_that_one(
        self, moment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        core, _ = make(num_blocks=65)
        original = getattr(core.kv, moment)

        def faulty(request: object, *args: int) -> object:
            if getattr(request, "request_id", "") == "bad":
                raise MemoryError("secret path /somewhere")
            return original(request, *args)

        monkeypatch.setattr(core.kv, moment, faulty)
        core.add("before", [2, 3, 4], STEADY)
        core.add("bad", range(2, 12), SamplingParams(n=2, max_tokens=8, seed=1, ignore_eos=True))
        core.add("after", [5, 6], STEADY)
        with caplog.at_level(logging.ERROR, logger="engine.sched.scheduler"):
            outputs = finish(core)
        ends = [o for o in outputs if o.request_id == "bad" and o.finish_reason]
        assert sorted(o.index for o in ends) == [0, 1]
        assert all(o.finish_reason is FinishReason.ERROR and "secret" not in (o.error or "") for o in ends)
        assert tokens(outputs, "before") == expected_choice([2, 3, 4], STEADY, 0, 6).token_ids
        assert tokens(outputs, "after") == expected_choice([5, 6], STEADY, 0, 6).token_ids
        assert "bad" in caplog.text

    def test_a_result_of_another_plan_is_refused(self) -> None:
        core, executor = make()
        core.add("r", [2, 3], STEADY)
        plan = core.scheduler.schedule()
        assert plan is not None
        with pytest.raises(AssertionError, match="another plan"):
            core.scheduler.update(plan._replace(step=7), executor_result(executor, plan).result())


def executor_result(executor: FakeExecutor, plan: StepPlan) -> Handle:
    executor.forward(plan)
    return executor.sample(plan)


class TestQueue:
    def test_a_full_queue_refuses(self) -> None:
        core, _ = make(max_num_seqs=2, max_queued_requests=1)
        for name in "abc":  # all at once: nothing has run yet
            core.add(name, [2], STEADY)
        with pytest.raises(Overloaded) as caught:
            core.add("d", [2], STEADY)
        assert caught.value.retry_after_s > 0
        core.step()
        with pytest.raises(Overloaded):
            core.add("d", [2], STEADY)
        core.abort("a")
        core.add("d", [2], STEADY)
        finish(core)

    def test_a_pool_that_is_short_refuses_nobody_the_queue_has_room_for(self) -> None:
        core, _ = make(max_num_seqs=4, max_queued_requests=1, num_blocks=4)
        for name in "abcde":
            core.add(name, [2, 3, 4, 5], STEADY)
            core.step()
        assert core.scheduler.num_waiting > 1
        finish(core)

    def test_an_id_may_be_used_again_only_after_its_end(self) -> None:
        core, _ = make()
        core.add("a", [2], STEADY)
        with pytest.raises(InvalidRequest, match="already"):
            core.add("a", [3], STEADY)
        finish(core)
        core.add("a", [3], STEADY)
        finish(core)
