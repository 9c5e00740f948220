"""What one step may still spend. Born and gone within one `schedule`, so that nothing stale survives."""

from __future__ import annotations


class StepBudget:
    """Tokens left in this step.

    Args:
        least_piece: tokens of a prompt that are computed at least, while so many are left of it.
    """

    __slots__ = ("_least_piece", "left")

    def __init__(self, tokens: int, least_piece: int = 1) -> None:
        self.left = tokens
        self._least_piece = least_piece

    @property
    def has_piece(self) -> bool:
        return self.left >= self._least_piece

    def grant(self, wanted: int) -> int:
        """Takes as many tokens as there are, `wanted` at most; fewer, or none, where else less than a piece
        would be taken or left behind."""
        granted = min(wanted, self.left)
        if granted < wanted < granted + self._least_piece:
            granted = wanted - self._least_piece
        if granted < min(wanted, self._least_piece):
            return 0
        self.left -= granted
        return granted

    def refund(self, tokens: int) -> None:
        self.left += tokens
