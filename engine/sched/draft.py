"""A step while it is being planned. Whoever is preempted meanwhile can be taken out again."""

from __future__ import annotations

from typing import NamedTuple

from engine.plan import RowStart, SequencePlan
from engine.request import Request, Status
from engine.sched.budget import StepBudget


class Planned(NamedTuple):
    """One request's part of a launched step, kept until its result is seen.

    Attributes:
        epoch: the request's count of preemptions then. Another one now, or a request that is not running,
            means that the result is nobody's.
    """

    request: Request
    epoch: int
    sequence: SequencePlan

    @property
    def is_current(self) -> bool:
        """Whether the request is still in the life it was planned in."""
        return self.request.preemptions == self.epoch and self.request.status is Status.RUNNING


class StepDraft:
    """Sequences of the step, those with a single token apart: they go first in the plan."""

    def __init__(self, budget: StepBudget) -> None:
        self.budget = budget
        self.preempted = False
        self.constrained = False
        self._single: dict[Request, SequencePlan] = {}
        self._longer: dict[Request, SequencePlan] = {}
        self._starts: dict[Request, RowStart] = {}

    def add(self, request: Request, num_tokens: int, new_block_ids: tuple[int, ...]) -> None:
        """Plans the request's next tokens, for which there are blocks, and counts them as computed."""
        if not request.started:
            self._start(request, len(new_block_ids))
        start = request.computed
        end = start + num_tokens
        token_ids = request.token_ids
        samples = end == len(token_ids) + request.in_flight and request.max_output > 0
        params = request.params
        sequence = SequencePlan(
            request.row,
            start,
            num_tokens,
            tuple(token_ids[start:end]),  # empty where the one token is still in flight
            new_block_ids,
            samples,
            params.logprobs if samples else None,
            self._prompt_logprobs(request, start),
            params.pooling is not None and end == request.prompt_len,
        )
        (self._single if num_tokens == 1 else self._longer)[request] = sequence
        request.computed = end
        if samples:
            request.in_flight += 1
            if request.matcher is not None:
                self.constrained = True

    def remove(self, request: Request) -> None:
        """Takes a request out again. Its counts are the caller's to set back."""
        sequence = self._single.pop(request, None) or self._longer.pop(request, None)
        self._starts.pop(request, None)
        if sequence is not None:
            self.budget.refund(sequence.num_tokens)

    @property
    def starts(self) -> dict[Request, RowStart]:
        return self._starts

    def planned(self) -> list[Planned]:
        """The step's parts in plan order."""
        return [
            Planned(request, request.preemptions, sequence)
            for part in (self._single, self._longer)
            for request, sequence in part.items()
        ]

    def _start(self, request: Request, num_new_blocks: int) -> None:
        table = request.block_ids
        request.started = True
        self._starts[request] = RowStart(
            request.row,
            request.params,
            request.seed,
            request.prompt_len,
            tuple(request.token_ids),
            tuple(table[: len(table) - num_new_blocks]),
        )

    @staticmethod
    def _prompt_logprobs(request: Request, start: int) -> int | None:
        collects = request.prompt_logprobs is not None and start + 1 < request.prompt_len
        return request.params.prompt_logprobs if collects else None
