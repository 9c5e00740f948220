"""Limits, stop rules, the queue and the budget by example."""

from __future__ import annotations

import pytest

from engine.errors import ContextTooLong, InvalidRequest, NeverFits
from engine.request import Request
from engine.sched.budget import StepBudget
from engine.sched.limits import RequestLimits
from engine.sched.queue import Queue
from engine.sched.stopping import Ending, StopRules
from engine.types import FinishReason, SamplingParams, token_array

LIMITS = RequestLimits(vocab_size=100, max_model_len=50, max_num_seqs=4, pool_tokens=40)


class TestLimits:
    def test_an_open_length_becomes_what_context_and_pool_leave(self) -> None:
        assert LIMITS.max_output(10, SamplingParams()) == 30
        roomy = RequestLimits(100, 50, 4, pool_tokens=4000)
        assert roomy.max_output(10, SamplingParams()) == 40

    def test_a_given_length_is_kept(self) -> None:
        assert LIMITS.max_output(10, SamplingParams(max_tokens=30)) == 30
        assert LIMITS.max_output(40, SamplingParams(max_tokens=0)) == 0

    @pytest.mark.parametrize(
        ("prompt", "params", "error", "words", "param"),
        [
            ([], SamplingParams(), InvalidRequest, ["empty"], "prompt"),
            ([5, 100], SamplingParams(), InvalidRequest, ["100", "99"], "prompt"),
            ([5, -1], SamplingParams(), InvalidRequest, ["-1"], "prompt"),
            ([5], SamplingParams(n=5), InvalidRequest, ["5", "4"], "n"),
            ([5], SamplingParams(stop_token_ids=(100,)), InvalidRequest, ["100"], "stop_token_ids"),
            ([5] * 10, SamplingParams(max_tokens=41), ContextTooLong, ["10", "41", "51", "50"], "max_tokens"),
            ([5] * 50, SamplingParams(), ContextTooLong, ["50", "51"], "prompt"),
            ([5] * 10, SamplingParams(max_tokens=31), NeverFits, ["10", "31", "41", "40"], "max_tokens"),
            ([5] * 40, SamplingParams(), NeverFits, ["40", "41"], "prompt"),
            ([5] * 10, SamplingParams(min_tokens=31), NeverFits, ["31"], "max_tokens"),
        ],
    )
    def test_what_can_never_work_is_refused_with_its_numbers(
        self,
        prompt: list[int],
        params: SamplingParams,
        error: type[InvalidRequest],
        words: list[str],
        param: str,
    ) -> None:
        with pytest.raises(error) as caught:
            LIMITS.check_prompt(prompt)
            LIMITS.max_output(len(prompt), params)
        assert caught.value.param == param
        assert all(word in caught.value.message for word in words)

    def test_an_array_is_checked_like_a_list(self) -> None:
        LIMITS.check_prompt(token_array([0, 99]))
        with pytest.raises(InvalidRequest, match="100"):
            LIMITS.check_prompt(token_array([100, 5]))
        with pytest.raises(InvalidRequest, match="empty"):
            LIMITS.check_prompt(token_array([]))


class TestStopRules:
    rules = StopRules(eos_token_ids=(1, 2))

    def ending(self, params: SamplingParams, *output: int, max_output: int = 10) -> Ending | None:
        request = Request("r", [50, 51], params)
        request.set_limits(max_output, self.rules.stop_ids(params))
        request.token_ids += output
        return self.rules.ending(request, output[-1])

    def test_the_models_own_end_has_no_stop_reason(self) -> None:
        assert self.ending(SamplingParams(), 7, 2) == (FinishReason.STOP, None)
        assert self.ending(SamplingParams(stop_token_ids=(2,)), 7, 2) == (FinishReason.STOP, None)

    def test_a_stop_token_is_named(self) -> None:
        assert self.ending(SamplingParams(stop_token_ids=(7,)), 7) == (FinishReason.STOP, 7)
        named = SamplingParams(stop_token_ids=(1,), ignore_eos=True)
        assert self.ending(named, 1) == (FinishReason.STOP, 1)

    def test_ignore_eos_goes_on(self) -> None:
        assert self.ending(SamplingParams(ignore_eos=True), 1) is None

    def test_min_tokens_holds_stops_back(self) -> None:
        params = SamplingParams(min_tokens=2, stop_token_ids=(7,))
        assert self.ending(params, 7) is None
        assert self.ending(params, 1) is None
        assert self.ending(params, 7, 7) == (FinishReason.STOP, 7)

    def test_length_ends_and_a_stop_on_the_last_token_is_a_stop(self) -> None:
        assert self.ending(SamplingParams(), 5, 5, max_output=2) == (FinishReason.LENGTH, None)
        assert self.ending(SamplingParams(), 5, 1, max_output=2) == (FinishReason.STOP, None)


def test_queue_is_sorted_by_priority_and_arrival() -> None:
    queue = Queue()
    requests = {}
    for arrival, (name, priority) in enumerate([("a", 0), ("b", 7), ("c", -1), ("d", 0), ("e", -1)]):
        requests[name] = request = Request(name, [1], SamplingParams(priority=priority))
        request.order = (priority, arrival)
    for name in "dbeac":
        queue.push(requests[name])
    assert [request.request_id for request in queue] == list("ceadb") and queue.peek() is requests["c"]
    queue.remove(requests["a"])
    assert [request.request_id for request in queue] == list("cedb") and len(queue) == 4


def test_who_is_not_in_the_queue_is_not_taken_for_another() -> None:
    queue = Queue()
    there, gone = (Request(name, [1], SamplingParams()) for name in "ab")
    queue.push(there)
    with pytest.raises(ValueError, match="not in the queue"):
        queue.remove(gone)
    assert list(queue) == [there]


def test_budget_grants_what_is_left() -> None:
    budget = StepBudget(5)
    assert budget.grant(3) == 3
    assert budget.grant(3) == 2
    budget.refund(2)
    assert budget.left == 2


@pytest.mark.parametrize(
    ("left", "wanted", "granted"),
    [(8, 5, 5), (5, 8, 5), (7, 8, 6), (1, 8, 0), (2, 3, 0), (1, 1, 1), (0, 1, 0), (2, 2, 2), (3, 4, 2)],
)
def test_budget_neither_takes_nor_leaves_less_than_a_piece(left: int, wanted: int, granted: int) -> None:
    budget = StepBudget(left, least_piece=2)
    assert budget.grant(wanted) == granted
    assert budget.left == left - granted
