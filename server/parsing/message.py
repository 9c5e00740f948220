"""Pieces -> a whole message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from server.parsing.pieces import CallArguments, CallBroken, CallEnd, CallStart, Content, Piece, Reasoning


@dataclass(slots=True)
class Call:
    """A tool call; its arguments are one JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Message:
    """What a choice says, once it has ended. A call that broke is in the content, as the model wrote it."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Message:
        """Puts the pieces of a whole text together."""
        content: list[str] = []
        reasoning: list[str] = []
        arguments: list[str] = []
        calls: list[Call] = []
        for piece in pieces:
            match piece:
                case Content(text):
                    content.append(text)
                case Reasoning(text):
                    reasoning.append(text)
                case CallStart(_, identity, name):
                    calls.append(Call(identity, name, ""))
                    arguments = []
                case CallArguments(_, text):
                    arguments.append(text)
                case CallEnd():
                    calls[-1].arguments = "".join(arguments)
                case CallBroken(_, source):
                    calls.pop()
                    content.append(source)
        return cls("".join(content), "".join(reasoning), calls)
