"""What a caller saw of each choice, and whether the engine may have said it. It knows no blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core import choice_seed
from engine.sched.scheduler import FAULT, NOT_FINITE
from engine.types import FinishReason, SamplingParams, TokenOutput
from tests.helpers.fake_executor import Expected, embedding_of, expected_choice, prompt_logprob


@dataclass
class Choice:
    """One submitted choice and its outputs so far."""

    prompt: list[int]
    params: SamplingParams
    index: int
    max_output: int
    explain: bool = False
    group: list[Choice] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)
    aborted: bool = False
    may_fail: bool = False  # a fault was injected into its request
    expected: Expected = field(init=False)

    def __post_init__(self) -> None:
        self.expected = expected_choice(self.prompt, self.params, self.index, self.max_output)
        if self.params.pooling is not None:
            self.expected.reason = FinishReason.STOP

    @property
    def token_ids(self) -> list[int]:
        return [output.token_id for output in self.outputs if output.token_id is not None]

    @property
    def ended(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None

    def hear(self, output: TokenOutput, broken: set[tuple[int, int]]) -> None:
        """Takes in one output.

        Args:
            broken: (seed, position) pairs at which the executor reports logits that are not finite.
        """
        assert not self.ended, f"something was said after the end: {output}"
        before = len(self.token_ids)
        self._check_prompt_logprobs(output)
        self._check_report(output)
        self._check_embedding(output)
        self.outputs.append(output)
        if output.token_id is not None:
            assert output.token_id == self.expected.token_ids[before], "another token than the text demands"
            assert (output.logprob is not None) == (self.params.logprobs is not None)
        assert output.cached_tokens == self.outputs[0].cached_tokens < len(self.prompt)
        if output.finish_reason is None:
            assert output.token_id is not None and len(self.token_ids) < len(self.expected.token_ids)
        elif output.finish_reason is FinishReason.ABORT:
            assert self.aborted and output.token_id is None
        elif output.finish_reason is FinishReason.ERROR:
            broke = output.error == NOT_FINITE and self._may_break(len(self.prompt) + before, broken)
            assert output.token_id is None
            assert broke or (self.may_fail and output.error == FAULT), f"failed without a fault: {output}"
        else:
            assert self.token_ids == self.expected.token_ids, "ended too early"
            assert output.finish_reason is self.expected.reason
            assert output.stop_reason == self.expected.stop_reason

    def _may_break(self, position: int, broken: set[tuple[int, int]]) -> bool:
        """A choice breaks by itself, or with the prompt that another of its group computed for it."""
        seed = self.params.seed or 0
        group = ((choice_seed(seed, choice.index), len(self.prompt)) for choice in self.group)
        return (choice_seed(seed, self.index), position) in broken or any(pair in broken for pair in group)

    def _check_report(self, output: TokenOutput) -> None:
        """With the first output, where it was asked for; who ended before he was admitted may have none."""
        report = output.cache
        if report is None:
            assert self.outputs or not self.explain or output.finish_reason in _CUT_SHORT, "not explained"
            return
        assert self.explain and not self.outputs, "explained twice, or to somebody who did not ask"
        assert report.prompt_tokens == len(self.prompt) > report.reused_tokens
        assert report.reused_tokens <= report.at_token <= len(self.prompt)
        assert output.token_id is None or report.reused_tokens == output.cached_tokens

    def _check_embedding(self, output: TokenOutput) -> None:
        """With the end, where it was asked for; never otherwise."""
        pooling = self.params.pooling
        whole = pooling is not None and output.finish_reason is FinishReason.STOP
        assert output.embedding == (embedding_of(self.prompt, pooling) if pooling and whole else None)

    def _check_prompt_logprobs(self, output: TokenOutput) -> None:
        if output.prompt_logprobs is not None:
            assert self.params.prompt_logprobs is not None and not self.outputs
            expected = [None, *(prompt_logprob(p, self.prompt[p]) for p in range(1, len(self.prompt)))]
            assert list(output.prompt_logprobs) == expected
            others = [c for c in self.group if c is not self]
            assert all(o.prompt_logprobs is None for c in others for o in c.outputs), "delivered twice"
        elif self.index == 0 and not self.outputs and output.finish_reason not in _CUT_SHORT:
            assert self.params.prompt_logprobs is None, "the prompt's logprobs were not delivered"


_CUT_SHORT = (FinishReason.ABORT, FinishReason.ERROR)
