"""Replies of APIs whose shapes are lists of parts: one choice, read by the same parsers as chat's.

Knows pieces and events; each API's own file knows its shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from engine.types import FinishReason, TokenEvent
from server.errors import ApiError
from server.parsing.message import Message
from server.parsing.parser import OutputParser
from server.parsing.pieces import CallEnd, Content, Piece
from server.render import KEEP_ALIVE, Choice, encode


def named_event(name: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event of a kind."""
    return b"event: %b\ndata: %b\n\n" % (name.encode("ascii"), encode(data))


class Reader:
    """Events -> pieces. `parser` None: all text is content."""

    def __init__(self, parser: OutputParser | None) -> None:
        self._parser = parser
        self.called = False

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._parser is None else self._parser.reasoning_tokens

    def pieces(self, event: TokenEvent) -> list[Piece]:
        if self._parser is None:
            return [Content(event.text)] if event.text else []
        found = self._parser.push(event.text, event.token_ids)
        if event.finish_reason is not None:
            found += self._parser.finish()
        if any(isinstance(piece, CallEnd) for piece in found):
            self.called = True
        return found


class PiecesChoice(Choice):
    """The choice of a whole reply."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(0)
        self.reader = reader
        self._pieces: list[Piece] = []

    @property
    def reasoning_tokens(self) -> int:
        return self.reader.reasoning_tokens

    def add(self, event: TokenEvent) -> None:
        super().add(event)
        self._pieces += self.reader.pieces(event)

    @property
    def message(self) -> Message:
        return Message.of(self._pieces)


class PiecesStream(ABC):
    """The one choice of a stream.

    Attributes:
        last: the event with the finish reason, once it has come.
    """

    keep_alive = KEEP_ALIVE

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.last: TokenEvent | None = None

    @abstractmethod
    def begin(self) -> bytes:
        """The frames before all others."""

    def event(self, choice: int, event: TokenEvent) -> bytes:
        frames = [self.piece(piece) for piece in self.reader.pieces(event)]
        if event.finish_reason is not None:
            self.last = event
        return b"".join(frames)

    @property
    def cut_off(self) -> bool:
        """Whether the limit of tokens ended it."""
        return self.last is not None and self.last.finish_reason is FinishReason.LENGTH

    @abstractmethod
    def piece(self, piece: Piece) -> bytes: ...

    @abstractmethod
    def end(self) -> bytes: ...

    @abstractmethod
    def failed(self, error: ApiError) -> bytes: ...
