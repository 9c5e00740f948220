"""Plans that compute one token of each sequence, run as graphs: which plan can be one, and its launch.

It knows plans and works; how graphs are made is `graphs`', what they are made of `decode`'s.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from torch import Tensor

from engine.exec.decode import DecodeStep, Work
from engine.exec.graphs import GraphMaker, GraphShelf, padded_sizes
from engine.exec.lanes import Lanes
from engine.plan import SequencePlan, StepPlan
from engine.sample.logprobs import PendingLogprobs
from engine.sample.sampler import PlainDraw, Sampler
from engine.types import StepRun


class GraphedDecode:
    """Decode steps of up to `most` sequences.

    Args:
        step: what the graphs do.
        lanes: what the host says to it; nobody else does.
    """

    def __init__(
        self, step: DecodeStep, lanes: Lanes, sampler: Sampler, maker: GraphMaker, most: int
    ) -> None:
        self._step = step
        self._lanes = lanes
        self._sampler = sampler
        self._sizes = padded_sizes(most)
        # The last are captured first: without filters before with them, the largest before the smaller.
        works = [Work(size, PlainDraw(filters)) for filters in (True, False) for size in self._sizes]
        self._shelf = GraphShelf(maker, self._pad, self._record, works)
        self._size = 0  # of the step launched last

    def launch(self, plan: StepPlan) -> StepRun:
        """Launches the plan's forward pass and, where the answer is GRAPH, the draw.

        Where the answer is `eager` nothing was launched. The plan's rows have started.
        """
        run, work = self._choose(plan)
        graph = None if work is None else self._shelf.find(work)
        if work is None or graph is None:
            self._lanes.forget()
            return run if work is None else StepRun.UNCAPTURED
        self._lanes.say(work.size, plan.sequences)
        self._size = work.size
        graph.replay()
        return run

    def capture_if_due(self) -> None:
        """For between two steps."""
        self._shelf.capture_if_due()

    def capture_next(self) -> bool:
        """For when there is nothing else to do. Whether a graph was captured."""
        return self._shelf.capture_next()

    def rehearse(self) -> None:
        """Launches, in a rehearsal, what compiles the kernels of all graphs but those with penalties.

        Kernels change with the size of the batch at powers of two at most. Filters and log probabilities have
        kernels of their own; the others are the same without them.
        """
        for size in reversed(self._sizes):
            if size & (size - 1) == 0 or size == self._sizes[-1]:
                work = Work(size, PlainDraw(filters=True), logprobs=True)
                self._pad(work)
                self._record(work)

    # ---- what the step launched last leaves, until the next one

    def drawn(self, wanted: Sequence[int | None]) -> tuple[Tensor, PendingLogprobs]:
        """The tokens of a GRAPH step, and their log probabilities for those that want them."""
        count = len(wanted)
        token_S = self._step.token_S[:count]
        if all(want is None for want in wanted):
            return token_S, PendingLogprobs(wanted, (), ())
        none_S0 = token_S.new_empty((count, 0))
        found = (token_S, self._step.logprob_S[:count], none_S0, none_S0)
        return token_S, PendingLogprobs(wanted, range(count), found)

    def forwarded(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, rows and positions of the tokens to be drawn, of a forward_graph step."""
        row_S = self._lanes.tensor(self._size)[0, :count]
        return self._step.hidden_SE[:count], row_S, self._step.next_position_S[:count]

    # ---- choosing and recording

    def _choose(self, plan: StepPlan) -> tuple[StepRun, Work | None]:
        sequences = plan.sequences
        if not all(map(_is_single, sequences)):
            return StepRun.PROMPT, None
        size = self._sizes[bisect_left(self._sizes, len(sequences))]
        rows = [sequence.row for sequence in sequences]
        wanted = {sequence.logprobs for sequence in sequences}
        if plan.constrained:
            run = StepRun.GRAMMAR
        elif not self._sampler.is_plain(rows, [sequence.start + 1 for sequence in sequences]):
            run = StepRun.BIAS
        elif not wanted <= {None, 0}:
            run = StepRun.LOGPROBS
        else:
            return StepRun.GRAPH, Work(size, self._sampler.plain_draw(rows), 0 in wanted)
        return run, Work(size, draw=None)

    def _pad(self, work: Work) -> None:
        self._lanes.pad(work.size)

    def _record(self, work: Work) -> None:
        self._step.run(work, self._lanes.tensor(work.size))


def _is_single(sequence: SequencePlan) -> bool:
    """Whether one token is computed, for the sake of the next one and of nothing else."""
    return (
        sequence.num_tokens == 1
        and sequence.samples
        and sequence.prompt_logprobs is None
        and len(sequence.new_block_ids) <= 1
    )
