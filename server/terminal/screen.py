"""What a terminal is sent: cleaned text, dim where it is not the answer. Knows no models or servers."""

from __future__ import annotations

import enum
from typing import TextIO

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class _In(enum.Enum):
    TEXT = enum.auto()
    ESCAPE = enum.auto()  # after ESC
    SEQUENCE = enum.auto()  # after ESC [: up to its final letter
    STRING = enum.auto()  # after ESC ] and the like: up to BEL, ESC \ or the end of the line


class Cleaner:
    """Takes control characters and escape sequences out of text that comes in any pieces.

    A model may write what moves the cursor, sets the title or fills the clipboard: none of it arrives.
    """

    def __init__(self) -> None:
        self._state = _In.TEXT

    def feed(self, text: str) -> str:
        return "".join(character for character in text if self._keeps(character))

    def _keeps(self, character: str) -> bool:
        state = self._state
        if character == "\x1b":
            self._state = _In.ESCAPE
        elif character == "\n":
            self._state = _In.TEXT
            return True
        elif state is _In.ESCAPE:
            self._state = _after_escape(character)
        elif state is _In.SEQUENCE:
            if "\x40" <= character <= "\x7e":
                self._state = _In.TEXT
        elif state is _In.STRING:
            if character in "\x07\x9c":
                self._state = _In.TEXT
        elif character == "\x9b":
            self._state = _In.SEQUENCE
        elif character in "\x90\x98\x9d\x9e\x9f":
            self._state = _In.STRING
        else:
            return character == "\t" or not _is_control(character)
        return False


def _after_escape(character: str) -> _In:
    if character == "[":
        return _In.SEQUENCE
    if character in "]PX^_":
        return _In.STRING
    # ESC ( B and the like have a letter more.
    return _In.ESCAPE if "\x20" <= character <= "\x2f" else _In.TEXT


def _is_control(character: str) -> bool:
    return character < "\x20" or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff"


def cleaned(text: str) -> str:
    return Cleaner().feed(text)


class Screen:
    """Writes to a terminal, or to a file that is one no longer.

    Args:
        colour: dim text is dim; else it is as all other.
    """

    def __init__(self, out: TextIO, colour: bool) -> None:
        self._out = out
        self._colour = colour
        self._dim = False
        self._at_line_start = True

    def write(self, text: str, dim: bool = False) -> None:
        """Text that is clean already."""
        if not text:
            return
        if self._colour and dim != self._dim:
            self._out.write(_DIM if dim else _PLAIN)
            self._dim = dim
        self._out.write(self._printable(text))
        self._out.flush()
        self._at_line_start = text.endswith("\n")

    def note(self, text: str) -> None:
        """A dim line of its own."""
        self.end_line()
        self.write(" ".join(cleaned(text).split()), dim=True)
        self.end_line()

    def end_line(self) -> None:
        """Back to the start of a line, and to plain text."""
        if not self._at_line_start:
            self._out.write("\n")
            self._at_line_start = True
        if self._dim:
            self._out.write(_PLAIN)
            self._dim = False
        self._out.flush()

    def _printable(self, text: str) -> str:
        encoding = self._out.encoding or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)
