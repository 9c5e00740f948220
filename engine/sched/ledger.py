"""Every submitted choice from its arrival to its one terminal output, and what was counted on the way.

It knows who lives and what was said of whom; nothing of steps, rows or blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.request import Request
from engine.types import FinishReason, TokenLogprob, TokenOutput


@dataclass(slots=True)
class Counters:
    """They only grow. Requests finished are counted by choice."""

    preemptions: int = 0
    recomputed_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {reason.value: 0 for reason in FinishReason})


class Ledger:
    """The live choices by request id, the outputs not yet taken, and the counters."""

    def __init__(self) -> None:
        self.counters = Counters()
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

    def choices(self, request_id: str) -> list[Request]:
        """The live choices of a request, the one that computes the prompt first; empty for unknown ids."""
        return list(self._choices.get(request_id, ()))

    def all_choices(self) -> Iterator[Request]:
        for choices in list(self._choices.values()):
            yield from list(choices)

    def token(self, request: Request, token_id: int, logprob: TokenLogprob | None) -> None:
        """Says that the choice goes on with a token."""
        self.counters.generated_tokens += 1
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
        self.counters.finished[reason.value] += 1
        self.counters.generated_tokens += token_id is not None
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
            )
        )

    def take_outputs(self) -> list[TokenOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs


def _hand_over(request: Request) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's logprobs leave with the first output that follows them."""
    collected, request.prompt_logprobs = request.prompt_logprobs, None
    return None if collected is None else tuple(collected)
