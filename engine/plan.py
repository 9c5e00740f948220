"""What the scheduler asks of the executor for one step, and what comes back. Plain, immutable data.

A plan can be sent to another process as it is: it holds integers and SamplingParams, no tensors and no
Request. Nobody but the scheduler makes one; nobody changes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.types import SamplingParams, StepRun, TokenLogprob


class RowStart(NamedTuple):
    """A row begins to serve a request (or serves it again after a preemption).

    Sent in the step where the row first appears, before that step's SequencePlan.
    """

    row: int
    params: SamplingParams
    seed: int
    prompt_len: int
    known_token_ids: tuple[int, ...]  # prompt and output so far: what penalties count
    block_ids: tuple[int, ...]  # the page table so far (prefix hit or fork)


class SequencePlan(NamedTuple):
    """One sequence's part of a step: compute `num_tokens` tokens from position `start`.

    `token_ids` is empty when the one token to compute is the row's last sampled token, which may still
    be on the device only.
    """

    row: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    new_block_ids: tuple[int, ...]  # appended to the row's page table before the step
    samples: bool  # draw a token from the last computed position
    logprobs: int | None = None  # alternatives wanted beside the drawn token
    prompt_logprobs: int | None = None  # logprobs of tokens start + 1 ... start + num_tokens of the prompt
    embeds: bool = False  # the prompt ends here: pool it


class StepPlan(NamedTuple):
    """One step. `sequences` holds those with a single token (decodes) first.

    With `constrained`, some of the tokens to be drawn must fit a grammar: `sample` gets masks.
    """

    step: int
    sequences: tuple[SequencePlan, ...]
    row_starts: tuple[RowStart, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()  # (source, destination), done before any write
    constrained: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)


class TokenMasks(NamedTuple):
    """Which tokens may be drawn, for the sequences under a grammar.

    Attributes:
        index_K: of those, among the sequences of the plan that sample.
        words_KW: one row each; bit t % 32 of word t // 32 is token t. Bits past the vocabulary mean nothing.
    """

    index_K: NDArray[np.int64]
    words_KW: NDArray[np.uint32]


class StepResult(NamedTuple):
    """What a step sampled, one entry per sequence of the plan that has `samples`, in plan order.

    Attributes:
        token_ids: the drawn tokens; NOT_FINITE where the row's logits were not, NOTHING_LEFT where no token
            that its grammar allows may be drawn.
        logprobs: aligned with token_ids, or empty when no sequence asked.
        prompt_logprobs: (index into plan.sequences, logprobs) for those that asked.
        embeddings: (index into plan.sequences, vector) for those that `embeds`; without those that are not
            finite.
        run: how it was computed.
    """

    token_ids: list[int]
    logprobs: Sequence[TokenLogprob | None] = ()
    prompt_logprobs: Sequence[tuple[int, Sequence[TokenLogprob]]] = ()
    embeddings: Sequence[tuple[int, bytes]] = ()
    run: StepRun = StepRun.OFF


NOT_FINITE = -1
NOTHING_LEFT = -2


class StepHandle(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Waits for the step's tokens to reach the host."""
        ...


class Executor(Protocol):
    """Runs plans, in order. `forward` then `sample`, once each per plan, so that what depends on the
    last token can be made on the host while the device computes."""

    def forward(self, plan: StepPlan) -> None: ...

    def sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepHandle: ...

    def prepare(self) -> bool:
        """Gets ready for later steps, in a moment without work. Whether there was anything to do."""
        ...
