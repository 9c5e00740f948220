"""What one step may still spend. Born and gone within one `schedule`, so that nothing stale survives."""

from __future__ import annotations


class StepBudget:
    """Tokens left in this step."""

    __slots__ = ("left",)

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def grant(self, wanted: int) -> int:
        """Takes as many tokens as there are, `wanted` at most."""
        granted = min(wanted, self.left)
        self.left -= granted
        return granted

    def refund(self, tokens: int) -> None:
        self.left += tokens
