"""What a parser makes of a model's text: typed pieces, in the order in which they were written.

Joined, the pieces of one kind do not depend on how the text was cut; only where one piece ends and the next
of the same kind begins does.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

# White space at the end of a text waits for what follows; of a longer run the rest is shown at once.
MAX_HELD_SPACE = 256


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model wrote before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: joined, one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call's arguments are whole."""

    index: int


@dataclass(frozen=True, slots=True)
class CallBroken:
    """A call that had begun is none. `source` is all the model wrote of it; what follows is content.

    Whole replies show the source in place of the call. A stream has shown half of the call; its arguments
    stay without an end.
    """

    index: int
    source: str


Piece = Content | Reasoning | CallStart | CallArguments | CallEnd | CallBroken


class Trimmed:
    """Text without white space at its ends, as it is being written."""

    __slots__ = ("_begun", "_held")

    def __init__(self, *, begun: bool = False) -> None:
        self._begun = begun
        self._held = ""

    def push(self, text: str) -> str:
        """Takes more and returns what is certainly within."""
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        self._begun = self._begun or bool(text)
        keep = max(len(text.rstrip()), len(text) - MAX_HELD_SPACE)
        self._held = text[keep:]
        return text[:keep]

    def rest(self) -> str:
        """The white space held back; the caller decides whether it was an end."""
        held, self._held = self._held, ""
        return held


class Output:
    """Collects the pieces of a text with calls in it.

    White space between calls and at the ends belongs to their notation and is left out; a text without calls
    is unchanged.

    Attributes:
        calls, ended: how many have begun; how many of these are whole.
        is_open, is_whole: of the call that has begun and not ended; whether its arguments are complete.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._pieces: list[Piece] = []
        self._arguments: list[str] = []
        self._text: list[str] = []
        self._content = Trimmed(begun=True)
        self._before = ""
        self._shown = False
        self.calls = self.ended = 0
        self.is_open = self.is_whole = False

    def drain(self) -> list[Piece]:
        """Everything since the last call."""
        self._flush()
        pieces, self._pieces = self._pieces, []
        return pieces

    def content(self, text: str) -> None:
        shown = self._content.push(text)
        if shown:
            self._shown = True
            self._text.append(shown)

    def finish(self) -> None:
        """No more text."""
        rest = self._content.rest()
        if rest and not self.ended:
            self._text.append(rest)

    def start(self, name: str, call_id: str | None = None) -> None:
        """The call has a name and its arguments begin."""
        self._before = ""
        if not self._shown:
            self._before = self._content.rest()
            self._content = Trimmed()
        self._add(CallStart(self.calls, call_id or self._new_id(), name))
        self.calls += 1
        self.is_open, self.is_whole = True, False

    def arguments(self, text: str) -> None:
        self._arguments.append(text)

    def whole(self) -> None:
        """The arguments are complete; their notation may not be."""
        self.is_whole = True

    def end(self) -> None:
        self._add(CallEnd(self.calls - 1))
        self.ended += 1
        self.is_open = False

    def broken(self, source: str) -> None:
        self._add(CallBroken(self.calls - 1, self._before + self._content.rest() + source))
        self._shown = True
        self._content = Trimmed(begun=True)
        self.is_open = False

    def _add(self, piece: Piece) -> None:
        self._flush()
        self._pieces.append(piece)

    def _flush(self) -> None:
        """Content and arguments never wait together: a call's start and end come between."""
        if self._text:
            self._pieces.append(Content("".join(self._text)))
            self._text = []
        if self._arguments:
            self._pieces.append(CallArguments(self.calls - 1, "".join(self._arguments)))
            self._arguments = []


def call_id() -> str:
    """An id as OpenAI makes them."""
    return "call_" + secrets.token_hex(12)


def short_call_id() -> str:
    """An id as Mistral's templates demand: nine letters and digits."""
    return secrets.token_hex(5)[:9]
