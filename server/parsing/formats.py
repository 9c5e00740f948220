"""The notations in which models write tool calls, one parser each.

| name        | a call                                                                | models             |
| ----------- | --------------------------------------------------------------------- | ------------------ |
| hermes      | <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>           | Hermes, Qwen       |
| llama3_json | {"name": "f", "parameters": {"a": 1}}, several with `;` between       | Llama 3.1 and 3.2  |
| pythonic    | [f(a=1), g()]                                                         | Llama 3.2, Llama 4 |
| mistral     | [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]                   | Mistral            |
|             | [TOOL_CALLS]f[ARGS]{"a": 1}                                           | Mistral since 2025 |
"""

from __future__ import annotations

import json
import re

from server.parsing.cursor import Malformed, Markers, Steps
from server.parsing.pieces import short_call_id
from server.parsing.tools import MAX_NAME_CHARS, ToolParser
from server.parsing.values import PythonValues


class Hermes(ToolParser):
    """Each call in its tags."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    markers = (OPEN, CLOSE)

    def read(self) -> Steps[None]:
        opens = Markers(self.OPEN)
        while not self.full and (yield from self.cursor.until(opens, self.out.content)):
            self.cursor.record(self.OPEN)
            if (yield from self.attempt(self.json_call(marked=True))):
                yield from self.cursor.space()
                yield from self.cursor.literal(self.CLOSE)


class Llama3Json(ToolParser):
    """A reply that is calls and nothing else, or calls behind the model's own token for them."""

    OPENS, CLOSE = ("<|python_tag|>", "<|python_start|>"), "<|python_end|>"
    markers = (*OPENS, CLOSE)

    def read(self) -> Steps[None]:
        yield from self.read_from_start(self._calls, *self.OPENS)

    def _calls(self, marker: str) -> Steps[None]:
        self.cursor.record(marker)
        while (yield from self.cursor.space()) == "{":
            if not (yield from self.attempt(self.json_call(marked=bool(marker)))) or self.full:
                return
            self.cursor.record()
            following = yield from self.cursor.space()
            if following == "<" and (yield from self.cursor.literal(self.CLOSE)):
                self.cursor.record()
            elif following == ";":
                self.cursor.take()
        self.out.content(self.cursor.recorded())


class Pythonic(ToolParser):
    """A list of calls as Python writes them, at the start of the reply or between Llama 4's tokens."""

    OPEN, CLOSE = "<|python_start|>", "<|python_end|>"
    markers = (OPEN, CLOSE)

    _NAME = re.compile(r"[A-Za-z0-9_.\-]+")
    _KEY = re.compile(r"[A-Za-z0-9_]+")

    def read(self) -> Steps[None]:
        yield from self.read_from_start(self._list, self.OPEN)

    def _list(self, marker: str) -> Steps[None]:
        self.cursor.record(marker)
        if (yield from self.cursor.space()) != "[":
            self.out.content(self.cursor.recorded())
            return
        self.cursor.take()
        while (yield from self.attempt(self._call(marked=bool(marker)))) and not self.full:
            self.cursor.record()
            following = yield from self.cursor.space()
            if following not in (",", "]"):
                self.out.content(self.cursor.recorded())
                return
            self.cursor.take()
            if following == "]":
                self.cursor.recorded()
                yield from self._close()
                return

    def _close(self) -> Steps[None]:
        yield from self.cursor.space()
        yield from self.cursor.literal(self.CLOSE)

    def _call(self, *, marked: bool) -> Steps[None]:
        yield from self.cursor.space()
        name = yield from self.cursor.word(self._NAME, MAX_NAME_CHARS)
        self.check_name(name, marked=marked)
        yield from self.cursor.expect("(")
        values = PythonValues(self.cursor)
        filled = False
        while (yield from values.more(")", filled)):
            key = yield from self.cursor.word(self._KEY, MAX_NAME_CHARS)
            if filled:
                self.out.arguments(", " + json.dumps(key))
            yield from self.cursor.expect("=")
            if not 1 <= len(key) <= MAX_NAME_CHARS:
                raise Malformed
            if not filled:
                self.out.start(name)
                self.out.arguments("{" + json.dumps(key))
            self.out.arguments(": ")
            yield from values.value(self.out.arguments)
            filled = True
        if not filled:
            self.out.start(name)
        self.out.arguments("}" if filled else "{}")
        self.arguments_read()


class Mistral(ToolParser):
    """A list of JSON calls behind one token, or a name and its arguments behind a token each."""

    OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
    markers = (OPEN, CALL_ID, ARGS)
    new_id = staticmethod(short_call_id)

    _NAME = re.compile(r"[^\s\[\]{}]+")
    _ID = re.compile(r"[A-Za-z0-9]+")

    def read(self) -> Steps[None]:
        opens = Markers(self.OPEN)
        while not self.full and (yield from self.cursor.until(opens, self.out.content)):
            self.cursor.record(self.OPEN)
            following = yield from self.cursor.space()
            if following == "[":
                yield from self._list()
            elif following == "{":
                yield from self.attempt(self.json_call(marked=True))
            else:
                yield from self.attempt(self._named_call())

    def _list(self) -> Steps[None]:
        self.cursor.take()
        while (yield from self.attempt(self.json_call(marked=True))) and not self.full:
            self.cursor.record()
            following = yield from self.cursor.space()
            if following == ",":
                self.cursor.take()
                continue
            if following == "]":
                self.cursor.take()
                self.cursor.recorded()
            self.out.content(self.cursor.recorded())
            return

    def _named_call(self) -> Steps[None]:
        name = yield from self.cursor.word(self._NAME, MAX_NAME_CHARS)
        self.check_name(name, marked=True)
        identity = None
        if (yield from self.cursor.literal(self.CALL_ID)):
            identity = yield from self.cursor.word(self._ID, MAX_NAME_CHARS)
            self.check_name(identity, marked=True)
        yield from self.cursor.literal(self.ARGS)
        if (yield from self.cursor.space()) != "{":
            raise Malformed
        yield from self.stream_arguments(name, identity)


TOOL_FORMATS: dict[str, type[ToolParser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "pythonic": Pythonic,
    "mistral": Mistral,
}
