"""When a choice ends by itself. It knows token ids; stop strings are the text layer's."""

from __future__ import annotations

from typing import NamedTuple

from engine.request import Request
from engine.types import FinishReason, SamplingParams


class Ending(NamedTuple):
    reason: FinishReason
    stop_reason: int | None = None


class StopRules:
    """Stop tokens and lengths.

    Args:
        eos_token_ids: the model's own ends of turn.
    """

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = frozenset(eos_token_ids)

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a choice."""
        return params.ending_ids(self._eos)

    def ending(self, request: Request, token_id: int) -> Ending | None:
        """Why the choice ends with this token, which is already appended; None where it goes on."""
        num_output = request.num_output
        if token_id in request.stop_ids and num_output >= request.params.min_tokens:
            is_own = token_id in self._eos and not request.params.ignore_eos
            return Ending(FinishReason.STOP, None if is_own else token_id)
        if num_output >= request.max_output:
            return Ending(FinishReason.LENGTH)
        return None
