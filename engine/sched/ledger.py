"""Every submitted choice from its arrival to its one terminal output.

It knows who lives and what was said of whom, and has it counted; nothing of steps, rows or blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.request import Request
from engine.sched.tally import Tally
from engine.types import FinishReason, TokenLogprob, TokenOutput
from engine.views import CacheReport


class Ledger:
    """The live choices by request id, and the outputs not yet taken."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.num_live = 0
        self._choices: dict[str, list[Request]] = {}
        self._outputs: list[TokenOutput] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._choices

    @property
    def has_outputs(self) -> bool:
        return bool(self._outputs)

    def enter(self, leader: Request) -> None:
        choices = [leader, *leader.followers]
        self._choices[leader.request_id] = choices
        self.num_live += len(choices)
        self._tally.arrived(leader)

    def choices(self, request_id: str) -> list[Request]:
        """The live choices of a request, the one that computes the prompt first; empty for unknown ids."""
        return list(self._choices.get(request_id, ()))

    def all_choices(self) -> Iterator[Request]:
        for choices in list(self._choices.values()):
            yield from list(choices)

    def token(self, request: Request, token_id: int, logprob: TokenLogprob | None) -> None:
        """Says that the choice goes on with a token."""
        request.account.generated_tokens += 1
        first = request.first_token_s is None
        if first:
            self._tally.first_token(request)
        self._outputs.append(
            TokenOutput(
                request.request_id,
                request.index,
                token_id,
                None,
                None,
                logprob,
                request.cached_tokens,
                None if request.prompt_logprobs is None else _hand_over(request),
                None,
                None if request.report is None else _hand_over_report(request),
                _queued_s(request) if first else None,
            )
        )

    def end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        token_id: int | None = None,
        stop_reason: int | None = None,
        logprob: TokenLogprob | None = None,
        error: str | None = None,
    ) -> None:
        """Says the choice's last word and forgets it. A choice unknown here ended before: our own bug."""
        choices = self._choices[request.request_id]
        choices.remove(request)
        if not choices:
            del self._choices[request.request_id]
        self.num_live -= 1
        if token_id is not None:
            request.account.generated_tokens += 1
            if request.first_token_s is None:
                self._tally.first_token(request)
        self._tally.ended(request, reason)
        prompt_logprobs = _hand_over(request) if error is None and reason is not FinishReason.ABORT else None
        self._outputs.append(
            TokenOutput(
                request.request_id,
                request.index,
                token_id,
                reason,
                stop_reason,
                logprob,
                request.cached_tokens,
                prompt_logprobs,
                error,
                _hand_over_report(request),
                _queued_s(request),
                request.embedding,
            )
        )

    def take_outputs(self) -> list[TokenOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs


def _hand_over(request: Request) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's logprobs leave with the first output that follows them."""
    collected, request.prompt_logprobs = request.prompt_logprobs, None
    return None if collected is None else tuple(collected)


def _hand_over_report(request: Request) -> CacheReport | None:
    """The report leaves with the choice's first output."""
    report, request.report = request.report, None
    return report


def _queued_s(request: Request) -> float | None:
    """From arrival to first admission; only the choice that computed the prompt was in the queue."""
    return None if request.admitted_s is None else request.admitted_s - request.arrival_s
