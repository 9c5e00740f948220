"""What a model thinks before it answers, apart from its answer.

Models write their thoughts between two tags at the start of a reply; with some, the chat template has written
the first tag already. Tags further on are part of the answer.
"""

from __future__ import annotations

from typing import NamedTuple

from server.parsing.cursor import Cursor, Markers, Steps
from server.parsing.pieces import Trimmed


class Tags(NamedTuple):
    """What encloses the thoughts."""

    open: str
    close: str


REASONING_TAGS: dict[str, Tags] = {
    "think": Tags("<think>", "</think>"),
    "mistral": Tags("[THINK]", "[/THINK]"),
    "thinking": Tags("<thinking>", "</thinking>"),
    "reasoning": Tags("<reasoning>", "</reasoning>"),
    "seed": Tags("<seed:think>", "</seed:think>"),
    "cohere": Tags("<|START_THINKING|>", "<|END_THINKING|>"),
}


class ReasoningSplitter:
    """One choice's text -> thoughts and answer.

    Args:
        opened: the prompt ends in the opening tag.

    Attributes:
        thinking: whether the text so far ends within the thoughts; None while that is not known.
        thought: whether there were any.
    """

    def __init__(self, tags: Tags, *, opened: bool = False) -> None:
        self._tags = tags
        self._cursor = Cursor()
        self._thoughts: list[str] = []
        self._answer: list[str] = []
        self.thinking: bool | None = True if opened else None
        self.thought = False
        self._steps: Steps[None] = self._read()
        next(self._steps)

    def push(self, text: str) -> tuple[str, str]:
        """Takes the text that follows; returns what it adds to the thoughts and to the answer."""
        self._cursor.feed(text)
        return self._advance()

    def finish(self) -> tuple[str, str]:
        """The text ends here."""
        self._cursor.end()
        return self._advance()

    def _advance(self) -> tuple[str, str]:
        next(self._steps, None)
        thoughts, answer = "".join(self._thoughts), "".join(self._answer)
        self._thoughts.clear()
        self._answer.clear()
        return thoughts, answer

    def _read(self) -> Steps[None]:
        if self.thinking is None:
            self._cursor.record()
            yield from self._cursor.space()
            self.thinking = yield from self._cursor.literal(self._tags.open)
        self.thought = self.thinking
        if self.thinking:
            self._cursor.recorded()
            yield from self._think()
        self._answer.append(self._cursor.recorded())
        yield from self._cursor.until(Markers(), self._answer.append)

    def _think(self) -> Steps[None]:
        trimmed = Trimmed()
        # A model may repeat the tag that its template has written.
        yield from self._cursor.space()
        yield from self._cursor.literal(self._tags.open)

        def write(text: str) -> None:
            self._thoughts.append(trimmed.push(text))

        yield from self._cursor.until(Markers(self._tags.close), write)
        self.thinking = False
        yield from self._cursor.space()
