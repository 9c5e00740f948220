"""What all tool-call parsers share: one attempt at a call, and the call as a JSON object.

A parser reads a model's text and hands on what is not a call as it is. Whatever turns out to be no call after
all goes back to the content, so that nothing a model wrote is lost. Memory is bounded by the longest call.

Unmarked notations (a bare JSON object, a bare list of calls) could be an answer as well as a call. There a
call must name a tool of the request and hold nothing else; where a marker says that a call follows, a name
the request does not know is passed on, because whoever runs the tools can tell the model so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from server.parsing.cursor import Cursor, Malformed, Markers, Steps
from server.parsing.pieces import Output, Piece, call_id
from server.parsing.values import Values, json_object

MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How one request wants its calls.

    Attributes:
        names: of the request's tools.
        parallel: False: one call at most; what follows it is dropped.
        max_calls: what follows these is content.
        max_call_chars: a longer call is content.
        new_id: makes the ids of calls; None: as the notation wants them.
    """

    names: frozenset[str] = field(default_factory=frozenset)
    parallel: bool = True
    max_calls: int = 128
    max_call_chars: int = 1 << 20
    new_id: Callable[[], str] | None = None


class ToolParser(ABC):
    """One choice's text -> content and calls.

    Class attributes:
        markers: what the notation is written with; some are special tokens of their models.
        new_id: makes ids that the models' templates take back.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    new_id = staticmethod(call_id)

    def __init__(self, options: CallOptions) -> None:
        self.options = options
        self.out = Output(options.new_id or self.new_id)
        self.cursor = Cursor()
        self._steps: Steps[None] | None = self._read_all()
        self._advance()

    def push(self, text: str) -> list[Piece]:
        """Takes the text that follows and returns what it completes."""
        self.cursor.feed(text)
        self._advance()
        return self.out.drain()

    def finish(self) -> list[Piece]:
        """The text ends here."""
        self.cursor.end()
        self._advance()
        self.out.finish()
        return self.out.drain()

    def _advance(self) -> None:
        if self._steps is None:
            self.cursor = Cursor()
        elif next(self._steps, self) is self:
            self._steps = None

    def _read_all(self) -> Steps[None]:
        yield from self.read()
        if self.options.parallel or not self.out.ended:
            self.out.content(self.cursor.recorded())
            yield from self.cursor.until(Markers(), self.out.content)

    @abstractmethod
    def read(self) -> Steps[None]:
        """Reads until the text ends or no more calls are wanted; what is left is content then."""

    @property
    def full(self) -> bool:
        """Whether no more calls are wanted."""
        return self.out.calls >= self.options.max_calls or (self.out.ended > 0 and not self.options.parallel)

    def attempt(self, call: Steps[None]) -> Steps[bool]:
        """Reads a call; if it is none, all that was recorded is content. Returns whether it was one."""
        cursor, out = self.cursor, self.out
        cursor.limit(self.options.max_call_chars)
        try:
            yield from call
        except Malformed:
            source = cursor.recorded()
            if not out.is_open:
                out.content(source)
                return False
            if not out.is_whole:
                out.broken(source)
                return False
            # The arguments are there, which is what counts: of a brace that is missing, nobody needs to know.
            out.end()
            out.content(source)
            return True
        finally:
            cursor.limit()
        cursor.recorded()
        out.end()
        return True

    def read_from_start(self, calls: Callable[[str], Steps[None]], *opens: str) -> Steps[None]:
        """Reads calls where the text begins, and behind each of these markers."""
        markers, marker = Markers(*opens), ""
        while True:
            yield from calls(marker)
            if self.full or not (marker := (yield from self.cursor.until(markers, self.out.content))):
                return

    def arguments_read(self) -> None:
        """They are whole; what was read of the call until now cannot become content any more."""
        self.out.whole()
        self.cursor.record()

    def json_call(self, *, marked: bool) -> Steps[None]:
        """Reads {"name": ..., "arguments": {...}}, or `parameters`, in any order."""
        name: str | None = None
        identity: str | None = None
        early: str | None = None
        done = False
        values = Values(self.cursor)
        yield from self.cursor.expect("{")
        filled = False
        while (yield from values.more("}", filled)):
            filled = True
            key = yield from values.text(MAX_NAME_CHARS)
            yield from self.cursor.expect(":")
            if key == "name" and name is None:
                name = yield from values.text(MAX_NAME_CHARS)
                self.check_name(name, marked=marked)
                if early is not None:
                    self._begin_whole(name, identity, early)
            elif key in ("arguments", "parameters") and not done:
                done = True
                early = yield from self._json_arguments(name, identity)
            elif key == "id" and identity is None:
                identity = yield from values.text(MAX_NAME_CHARS)
            elif marked:
                yield from values.value(_nowhere)
            else:
                raise Malformed
        if name is None or not (done or marked):
            raise Malformed
        if not done:
            self._begin_whole(name, identity, "{}")

    def check_name(self, name: str, *, marked: bool) -> None:
        """Raises Malformed for what cannot be the name of a tool."""
        known = marked or name in self.options.names
        if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or not known:
            raise Malformed

    def _json_arguments(self, name: str | None, identity: str | None) -> Steps[str | None]:
        """Reads the arguments, written on at once if the call has a name; returns them if it has none yet."""
        values, parts = Values(self.cursor), list[str]()
        if (yield from self.cursor.space()) == "{":
            if name is not None:
                yield from self.stream_arguments(name, identity)
                return None
            yield from values.value(parts.append)
            text = "".join(parts)
        else:
            text = yield from self._unusual_arguments(values)
        if name is None:
            return text
        self._begin_whole(name, identity, text)
        return None

    def _unusual_arguments(self, values: Values) -> Steps[str]:
        """Reads null, or an object written as a string."""
        if (yield from self.cursor.peek()) == '"':
            return json_object((yield from values.text(self.options.max_call_chars)))
        parts: list[str] = []
        yield from values.value(parts.append)
        if parts != ["null"]:
            raise Malformed
        return "{}"

    def stream_arguments(self, name: str, identity: str | None = None) -> Steps[None]:
        """Reads a call's arguments, which begin here, and hands them on as they come."""
        self.out.start(name, identity)
        yield from Values(self.cursor).value(self.out.arguments)
        self.arguments_read()

    def _begin_whole(self, name: str, identity: str | None, arguments: str) -> None:
        self.out.start(name, identity)
        self.out.arguments(arguments)
        self.arguments_read()


def _nowhere(text: str) -> None:
    """Writes nothing."""
