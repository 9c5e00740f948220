"""Text that is still being written, read from left to right.

The grammars here are generators: they read as if all text were there, and where it is not, they `yield` and
go on when more has come. What is read is forgotten at once, unless it is recorded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Write = Callable[[str], object]

UNLIMITED = sys.maxsize

_SPACE = re.compile(r"\s+")


class Malformed(Exception):
    """What stands here is not what the grammar says."""


class Markers:
    """A few strings to find in a text; none is the beginning of another."""

    def __init__(self, *texts: str) -> None:
        assert not any(a is not b and b.startswith(a) for a in texts for b in texts)
        self._texts = texts
        self._search = re.compile("|".join(map(re.escape, texts)) or r"(?!)").search
        self._firsts = frozenset(text[0] for text in texts)
        self._longest = max(map(len, texts), default=1)

    def find(self, text: str, start: int) -> tuple[int, str]:
        """Returns where the first marker stands and which; "" if none does, and then how far none begins."""
        found = self._search(text, start)
        if found is not None:
            return found.start(), found[0]
        for at in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts and any(marker.startswith(text[at:]) for marker in self._texts):
                return at, ""
        return len(text), ""


class Cursor:
    """See the module."""

    __slots__ = ("_at", "_ended", "_from", "_left", "_recorded", "_text")

    def __init__(self, text: str = "", *, ended: bool = False) -> None:
        self._text = text
        self._at = 0
        self._ended = ended
        self._recorded: list[str] | None = None
        self._from = 0
        self._left = UNLIMITED

    def feed(self, text: str) -> None:
        """Adds what was written since."""
        if self._recorded is not None:
            self._recorded.append(self._text[self._from : self._at])
        self._text = self._text[self._at :] + text
        self._at = self._from = 0

    def end(self) -> None:
        """Nothing more will be written."""
        self._ended = True

    def record(self, before: str = "") -> None:
        """From here on, what is read can be had again; `before` is to stand in front of it."""
        self._recorded = [before]
        self._from = self._at

    def recorded(self) -> str:
        """What was read since `record`, and no more recording."""
        if self._recorded is None:
            return ""
        source = "".join((*self._recorded, self._text[self._from : self._at]))
        self._recorded = None
        return source

    def limit(self, chars: int = UNLIMITED) -> None:
        """From here on, no more than this is read: then everything is malformed."""
        self._left = chars

    def peek(self) -> Steps[str]:
        """The next character, or "" at the end.

        Raises:
            Malformed: the limit is reached.
        """
        if not self._left:
            raise Malformed
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def take(self) -> str:
        """Reads the character that was peeked at."""
        self._at += 1
        self._left -= 1
        return self._text[self._at - 1]

    def run(self, pattern: re.Pattern[str], most: int = UNLIMITED) -> str:
        """Reads what matches here and is written already."""
        end = min(len(self._text), self._at + min(self._left, most))
        match = pattern.match(self._text, self._at, end)
        if match is None:
            return ""
        self._at = match.end()
        self._left -= len(match[0])
        return match[0]

    def word(self, pattern: re.Pattern[str], most: int) -> Steps[str]:
        """Reads all that matches here, a class of characters; one more than `most` where there are more."""
        word = ""
        while len(word) <= most and (yield from self.peek()):
            part = self.run(pattern, most + 1 - len(word))
            if not part:
                break
            word += part
        return word

    def space(self) -> Steps[str]:
        """Reads white space and returns the character after it, or "" at the end."""
        while (following := (yield from self.peek())).isspace():
            self.run(_SPACE)
        return following

    def expect(self, character: str) -> Steps[None]:
        """Reads white space and then this character.

        Raises:
            Malformed: there is another.
        """
        if (yield from self.space()) != character:
            raise Malformed
        self.take()

    def literal(self, text: str) -> Steps[bool]:
        """Reads `text` if it stands here; else reads nothing."""
        while True:
            if self._text.startswith(text, self._at):
                self._at += len(text)
                self._left = max(0, self._left - len(text))
                return True
            if self._ended or not text.startswith(self._text[self._at :]):
                return False
            yield

    def until(self, markers: Markers, write: Write) -> Steps[str]:
        """Hands on what stands before the first marker and reads it; returns "" if the text ends first."""
        while True:
            at, marker = markers.find(self._text, self._at)
            if self._ended and not marker:
                at = len(self._text)
            if at > self._at:
                write(self._text[self._at : at])
            self._at = at + len(marker)
            if marker or self._ended:
                return marker
            yield
