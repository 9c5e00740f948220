"""Replies that are more than text: what a model thinks, and the tools it calls, in OpenAI's shapes.

Knows pieces and the wire; how pieces are found in a text is server.parsing's. Only requests whose text is
read come this way: others stay on render.py's shorter one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.types import FinishReason, TokenEvent
from server.chat import tool_call
from server.logprobs import chat_logprobs
from server.parsing.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from server.prompts import Tokenizer
from server.render import ChatChunks, Common, Fields, encode, ending_fields
from server.render_pieces import PiecesChoice, Reader

TOOL_CALLS = "tool_calls"


class Shown(NamedTuple):
    """What of a reply its caller is shown.

    Attributes:
        reasoning: what the model thought.
        calls_ended_it: that it ended because of its calls; not where the caller named the function.
    """

    reasoning: bool
    calls_ended_it: bool


class ParsedChunks(ChatChunks):
    """chat.completion.chunk with deltas of all kinds.

    A call that breaks has been shown in part: its arguments stay without an end, and the rest is content.

    Args:
        readers: one for each choice.
    """

    _before_text = b'"delta":'

    def __init__(self, common: Common, readers: Sequence[Reader], shown: Shown) -> None:
        super().__init__(common, len(readers))
        self._readers = readers
        self._shown = shown
        if readers[0].may_call:
            self._first_content = b"null"  # as OpenAI begins a reply that may be a call alone

    def event(self, choice: int, event: TokenEvent) -> bytes:
        pieces = self._readers[choice].pieces(event)
        frames: list[bytes] = []
        deltas = [delta for piece in pieces if (delta := self._delta(piece)) is not None]
        logprobs = None
        if event.logprobs:
            logprobs = chat_logprobs(self._tokenizer, event.logprobs)
            deltas = deltas or [{}]
        for delta in deltas:
            frames.append(self._frame(choice, delta, logprobs))
            logprobs = None
        if event.finish_reason is not None:
            frames.append(self._finish(choice, event))
        return b"".join(frames)

    def _delta(self, piece: Piece) -> Mapping[str, Any] | None:
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text, "reasoning": text} if self._shown.reasoning else None
            case CallStart(index, identity, name):
                function = {"name": name, "arguments": ""}
                return {
                    "tool_calls": [{"index": index, "id": identity, "type": "function", "function": function}]
                }
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return None

    def _frame(self, choice: int, delta: Mapping[str, Any], logprobs: Any) -> bytes:
        end = b',"logprobs":' + encode(logprobs) + b',"finish_reason":null' + self._close()
        return self._leads[choice] + encode(delta) + end

    def _ending_fields(self, choice: int, event: TokenEvent) -> Fields:
        return _ending(event, self._readers[choice].called and self._shown.calls_ended_it)


class ParsedChoice(PiecesChoice):
    """One choice of a whole chat reply."""

    def __init__(self, reader: Reader, index: int, shown: Shown) -> None:
        super().__init__(reader, index)
        self._shown = shown

    def chat(self, tokenizer: Tokenizer, with_logprobs: bool) -> dict[str, Any]:
        said = self.message
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if not said.content and (said.calls or said.reasoning):
            message["content"] = None
        if said.calls:
            message["tool_calls"] = [tool_call(call.id, call.name, call.arguments) for call in said.calls]
        if said.reasoning and self._shown.reasoning:
            message |= {"reasoning_content": said.reasoning, "reasoning": said.reasoning}
        return {
            **super().chat(tokenizer, with_logprobs),
            "message": message,
            **_ending(self.last, bool(said.calls) and self._shown.calls_ended_it),
        }


def _ending(event: TokenEvent, called: bool) -> dict[str, Any]:
    """A reply that ended of itself and has calls ended because of them, unless the caller named the call."""
    ending = ending_fields(event)
    if called and event.finish_reason is FinishReason.STOP:
        ending["finish_reason"] = TOOL_CALLS
    return ending
