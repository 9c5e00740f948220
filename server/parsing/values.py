"""Values in JSON or in Python's notation -> JSON text, while they are being written.

A hand-written reader, because nothing a model writes is ever evaluated. What comes out is valid JSON with
Python's usual spacing, whatever white space was in it; raw line breaks in strings, which models write and
JSON forbids, are escaped. Depth is bounded here, length by the cursor's limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from server.parsing.cursor import Cursor, Malformed, Steps, Write

MAX_DEPTH = 64
MAX_WORD_CHARS = 400

_WORD = re.compile(r"[-+.0-9A-Za-z_]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_HEX = re.compile(r"[0-9A-Fa-f]+")
_PLAIN = re.compile(r"""[^"'\\\x00-\x1f]+""")


class Values:
    """Reads JSON values."""

    words: Mapping[str, str] = {"true": "true", "false": "false", "null": "null"}
    quotes = '"'
    lists: Mapping[str, str] = {"[": "]"}
    trailing_comma = False

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor

    def value(self, write: Write, depth: int = 0) -> Steps[None]:
        """Reads one value.

        Raises:
            Malformed: after all that was read has been written.
        """
        first = yield from self._cursor.space()
        if first == "{":
            yield from self._object(write, depth + 1)
        elif first and first in self.lists:
            yield from self._list(write, depth + 1)
        elif first and first in self.quotes:
            yield from self.string(write)
        else:
            yield from self._scalar(write)

    def text(self, most: int) -> Steps[str]:
        """Reads a string of at most so many characters and returns what it says."""
        parts: list[str] = []
        if ((yield from self._cursor.space()) or " ") not in self.quotes:
            raise Malformed
        yield from self.string(parts.append)
        text: str = json.loads("".join(parts))
        if len(text) > most:
            raise Malformed
        return text

    def _scalar(self, write: Write) -> Steps[None]:
        word = yield from self._cursor.word(_WORD, MAX_WORD_CHARS)
        write(self.words.get(word, word))
        if word not in self.words and not (len(word) <= MAX_WORD_CHARS and _NUMBER.fullmatch(word)):
            raise Malformed

    def _object(self, write: Write, depth: int) -> Steps[None]:
        self._enter(depth)
        write("{")
        filled = False
        while (yield from self.more("}", filled)):
            if filled:
                write(", ")
            if ((yield from self._cursor.space()) or " ") not in self.quotes:
                raise Malformed
            yield from self.string(write)
            yield from self._cursor.expect(":")
            write(": ")
            yield from self.value(write, depth)
            filled = True
        write("}")

    def _list(self, write: Write, depth: int) -> Steps[None]:
        close = self.lists[self._enter(depth)]
        write("[")
        filled = False
        while (yield from self.more(close, filled)):
            if filled:
                write(", ")
            yield from self.value(write, depth)
            filled = True
        write("]")

    def _enter(self, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise Malformed
        return self._cursor.take()

    def more(self, close: str, filled: bool) -> Steps[bool]:
        """Reads the comma between two items, or what closes them; returns whether there is another."""
        following = yield from self._cursor.space()
        if filled and following == ",":
            self._cursor.take()
            if not self.trailing_comma:
                return True
            following = yield from self._cursor.space()
        elif filled and following != close:
            raise Malformed
        if following == close:
            self._cursor.take()
            return False
        return True

    def string(self, write: Write) -> Steps[None]:
        """Reads the string whose quote stands next."""
        quote = self._cursor.take()
        write('"')
        while (character := (yield from self._cursor.peek())) != quote:
            if character == "\\":
                self._cursor.take()
                yield from self._escape(write)
            elif not character:
                raise Malformed
            else:
                write(self._cursor.run(_PLAIN) or json.dumps(self._cursor.take())[1:-1])
        self._cursor.take()
        write('"')

    def _escape(self, write: Write) -> Steps[None]:
        character = yield from self._cursor.peek()
        if character == "u":
            self._cursor.take()
            write("\\u" + (yield from self._hex(4)))
        elif character and character in '"\\/bfnrt':
            write("\\" + self._cursor.take())
        elif character == "'":  # not JSON's, but it can only mean one thing
            write(self._cursor.take())
        else:
            write("\\")
            raise Malformed

    def _hex(self, count: int) -> Steps[str]:
        digits = ""
        while len(digits) < count:
            if not _HEX.match((yield from self._cursor.peek())):
                raise Malformed
            digits += self._cursor.take()
        return digits


class PythonValues(Values):
    """Reads Python's literals: numbers, strings, True, False, None, lists, tuples and dictionaries."""

    words: Mapping[str, str] = {**Values.words, "True": "true", "False": "false", "None": "null"}
    quotes = "\"'"
    lists: Mapping[str, str] = {"[": "]", "(": ")"}
    trailing_comma = True

    _escapes: Mapping[str, str] = dict(zip("ntrbfav0\\'\"", "\n\t\r\b\f\a\v\0\\'\"", strict=True)) | {
        "\n": ""
    }
    _hex_digits: Mapping[str, int] = {"x": 2, "u": 4, "U": 8}

    def _escape(self, write: Write) -> Steps[None]:
        character = yield from self._cursor.peek()
        if not character:
            raise Malformed
        self._cursor.take()
        if character in self._hex_digits:
            code = int((yield from self._hex(self._hex_digits[character])), 16)
            if code > 0x10FFFF:
                raise Malformed
            text = chr(code)
        else:
            # Python keeps the backslash of an escape it does not know.
            text = self._escapes.get(character, "\\" + character)
        write(json.dumps(text)[1:-1])


def json_object(text: str) -> str:
    """`text`, which should be a JSON object and nothing else, as the reader would write it.

    Raises:
        Malformed: it is not.
    """
    cursor = Cursor(text, ended=True)
    parts: list[str] = []

    def read() -> Steps[bool]:
        if (yield from cursor.space()) != "{":
            return False
        yield from Values(cursor).value(parts.append)
        return not (yield from cursor.space())

    try:
        next(read())
    except StopIteration as done:
        if done.value:
            return "".join(parts)
    raise Malformed
