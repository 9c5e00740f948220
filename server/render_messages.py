"""Pieces -> Anthropic's messages and stream events."""

from __future__ import annotations

import json
from typing import Any

from engine.types import FinishReason, TokenEvent
from server.errors import ApiError
from server.generation import Generation
from server.parsing.message import Call
from server.parsing.pieces import CallArguments, CallBroken, CallEnd, CallStart, Content, Piece, Reasoning
from server.render import Fields, Head, named_event
from server.render_pieces import PiecesChoice, PiecesStream, Reader


def reply(head: Head, generation: Generation, choice: PiecesChoice) -> Fields:
    """A whole message."""
    said = choice.message
    content: list[Fields] = [_thinking(said.reasoning)] if said.reasoning else []
    content += [_text(said.content)] if said.content else []
    content += [_tool_use(call) for call in said.calls]
    return {
        **_message(head, content),
        **_ending(choice.last, bool(said.calls)),
        "usage": _usage(generation),
    }


class MessageStream(PiecesStream):
    """message_start, blocks one after another, message_delta, message_stop."""

    keep_alive = named_event("ping", {"type": "ping"})

    def __init__(self, head: Head, generation: Generation, reader: Reader) -> None:
        super().__init__(reader)
        self._head = head
        self._generation = generation
        self._open = ""  # the type of the block that is being written
        self._index = -1

    def begin(self) -> bytes:
        message = {
            **_message(self._head, []),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**_usage(self._generation), "output_tokens": 0},
        }
        return named_event("message_start", {"type": "message_start", "message": message})

    def piece(self, piece: Piece) -> bytes:
        match piece:
            case Content(text):
                return self._within(_text("")) + self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                return self._within(_thinking("")) + self._delta({"type": "thinking_delta", "thinking": text})
            case CallStart(_, identity, name):
                return self._start(_tool_use(Call(identity, name, "{}")))
            case CallArguments(_, text):
                return self._delta({"type": "input_json_delta", "partial_json": text})
            case CallEnd() | CallBroken():
                return self._stop()

    def end(self) -> bytes:
        if self.last is None:
            return b""  # the caller has gone
        delta = {
            "type": "message_delta",
            "delta": _ending(self.last, self.reader.called),
            "usage": _usage(self._generation),
        }
        stop = named_event("message_stop", {"type": "message_stop"})
        return self._stop() + named_event("message_delta", delta) + stop

    def failed(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error.anthropic_body()

    def _within(self, block: Fields) -> bytes:
        """Makes sure that a block of this type is open."""
        return b"" if self._open == block["type"] else self._start(block)

    def _start(self, block: Fields) -> bytes:
        before = self._stop()
        self._open = block["type"]
        self._index += 1
        return before + self._event("content_block_start", content_block=block)

    def _delta(self, delta: Fields) -> bytes:
        return self._event("content_block_delta", delta=delta)

    def _stop(self) -> bytes:
        if not self._open:
            return b""
        self._open = ""
        return self._event("content_block_stop")

    def _event(self, name: str, **fields: Any) -> bytes:
        return named_event(name, {"type": name, "index": self._index, **fields})


def _message(head: Head, content: list[Fields]) -> Fields:
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
    }


def _text(text: str) -> Fields:
    return {"type": "text", "text": text}


def _thinking(text: str) -> Fields:
    # Anthropic signs thoughts so that they cannot be changed; here nothing depends on that.
    return {"type": "thinking", "thinking": text, "signature": ""}


def _tool_use(call: Call) -> Fields:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}


def _ending(event: TokenEvent, called: bool) -> Fields:
    if event.finish_reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(event.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": event.stop_reason}
    return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


def _usage(generation: Generation) -> Fields:
    """What was reused is not counted as input again: all three together are the prompt."""
    cached = generation.cached_tokens
    return {
        "input_tokens": generation.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": generation.completion_tokens,
    }
