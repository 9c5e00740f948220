"""Replies that are more than text: one choice's events, read as pieces, for all APIs.

Knows pieces and events; each API's own file knows its shapes.
"""

from __future__ import annotations

from abc import abstractmethod

from engine.types import FinishReason, TokenEvent
from server.parsing.message import Message
from server.parsing.parser import OutputParser
from server.parsing.pieces import CallEnd, Content, Piece
from server.render import Choice, Frames


class Reader:
    """One choice's events -> pieces. `parser` None: all text is content.

    Attributes:
        called: whether a call has been made.
    """

    def __init__(self, parser: OutputParser | None) -> None:
        self._parser = parser
        self.called = False

    @property
    def is_plain(self) -> bool:
        return self._parser is None

    @property
    def may_call(self) -> bool:
        """Whether calls are looked for."""
        return self._parser is not None and self._parser.may_call

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
    """One choice of a whole reply, read while it is collected."""

    def __init__(self, reader: Reader, index: int = 0) -> None:
        super().__init__(index)
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


class PiecesStream(Frames):
    """The one choice of a stream.

    Attributes:
        last: the event with the finish reason, once it has come.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.last: TokenEvent | None = None

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
