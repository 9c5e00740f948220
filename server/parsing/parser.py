"""One choice's whole text: thoughts first, then content and calls."""

from __future__ import annotations

from collections.abc import Sequence

from server.parsing.pieces import Content, Piece, Reasoning
from server.parsing.reasoning import ReasoningSplitter
from server.parsing.tools import ToolParser


class OutputParser:
    """What a reply is read with.

    Args:
        end_id: the closing tag of the thoughts, where that is one token.

    Attributes:
        reasoning_tokens: tokens of the thoughts so far, tags included.
    """

    def __init__(
        self, reasoning: ReasoningSplitter | None, tools: ToolParser | None, end_id: int | None = None
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._end_id = end_id
        self._undecided_tokens = 0
        self.reasoning_tokens = 0

    @property
    def may_call(self) -> bool:
        """Whether calls are looked for."""
        return self._tools is not None

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Piece]:
        """Takes the text that follows, and the tokens it came with; returns what it completes."""
        if self._reasoning is None:
            return self._answer(text)
        before = self._reasoning.thinking
        thoughts, answer = self._reasoning.push(text)
        if before is not False:
            self._count(token_ids)
        pieces = self._answer(answer)
        return [Reasoning(thoughts), *pieces] if thoughts else pieces

    def finish(self) -> list[Piece]:
        """The text ends here."""
        pieces: list[Piece] = []
        if self._reasoning is not None:
            thoughts, answer = self._reasoning.finish()
            pieces = [Reasoning(thoughts)] if thoughts else []
            pieces += self._answer(answer)
        return pieces + self._tools.finish() if self._tools is not None else pieces

    def _answer(self, text: str) -> list[Piece]:
        if not text:
            return []
        return self._tools.push(text) if self._tools is not None else [Content(text)]

    def _count(self, token_ids: Sequence[int]) -> None:
        """Tokens that came while it was not clear that the answer had begun."""
        assert self._reasoning is not None
        tokens = len(token_ids)
        if self._reasoning.thinking is None:
            self._undecided_tokens += tokens
            return
        if not self._reasoning.thinking and self._end_id in token_ids:
            tokens = token_ids.index(self._end_id) + 1
        if self._reasoning.thinking or self._reasoning.thought:
            self.reasoning_tokens += self._undecided_tokens + tokens
        self._undecided_tokens = 0
