"""The core by example: depth, seeds, failures of the executor, and what it says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.core import EngineCore, choice_seed
from engine.errors import InvalidRequest
from engine.stats import BUCKETS
from engine.types import FinishReason, SamplingParams, TokenOutput
from engine.views import CacheScope, EvictionCause, MissReason
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
        core.check()
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
            core.check()
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
