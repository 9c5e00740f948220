"""Replies that are more than text: what a model thinks, and the tools it calls, in OpenAI's shapes.

Knows pieces and the wire; how pieces are found in a text is server.parsing's. Only requests whose text is
read come this way: others stay on render.py's shorter one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.types import FinishReason, TokenEvent
from server.logprobs import chat_entries
from server.parsing.message import Call, Message
from server.parsing.parser import OutputParser
from server.parsing.pieces import CallArguments, CallEnd, CallStart, Content, Piece, Reasoning
from server.prompts import Tokenizer
from server.render import ChatChunks, Choice, Head, Usage, encode, ending_fields

TOOL_CALLS = "tool_calls"


class ParsedChunks(ChatChunks):
    """chat.completion.chunk with deltas of all kinds.

    A call that breaks has been shown in part: its arguments stay without an end, and the rest is content.

    Args:
        parsers: one for each choice.
        show_reasoning: whether the caller wants to see it.
        named: the caller named the function that is called.
    """

    _before_text = b'"delta":'

    def __init__(
        self,
        head: Head,
        usage: Usage,
        usage_in_stream: tuple[bool, bool],
        tokenizer: Tokenizer,
        parsers: Sequence[OutputParser],
        *,
        show_reasoning: bool = True,
        named: bool = False,
    ) -> None:
        super().__init__(head, usage, usage_in_stream, tokenizer, len(parsers))
        self._parsers = parsers
        self._show_reasoning = show_reasoning
        self._named = named
        self._called: set[int] = set()
        if parsers[0].may_call:
            self._first_content = b"null"  # as OpenAI begins a reply that may be a call alone

    def event(self, choice: int, event: TokenEvent) -> bytes:
        parser = self._parsers[choice]
        pieces = parser.push(event.text, event.token_ids)
        if event.finish_reason is not None:
            pieces += parser.finish()
        frames: list[bytes] = []
        if any(isinstance(piece, CallEnd) for piece in pieces):
            self._called.add(choice)
        deltas = [delta for piece in pieces if (delta := self._delta(piece)) is not None]
        logprobs: Any = None
        if event.logprobs:
            logprobs = {"content": chat_entries(self._tokenizer, event.logprobs), "refusal": None}
            deltas = deltas or [{}]
        for delta in deltas:
            frames.append(self._frame(choice, delta, logprobs))
            logprobs = None
        if event.finish_reason is not None:
            frames.append(self._last(choice, event))
        return b"".join(frames)

    def _delta(self, piece: Piece) -> Mapping[str, Any] | None:
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text, "reasoning": text} if self._show_reasoning else None
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

    def _last(self, choice: int, event: TokenEvent) -> bytes:
        ending = _ending(event, choice in self._called and not self._named)
        return self._lead(choice, b'"delta":{},"logprobs":null,' + encode(ending)[1:-1]) + self._close()


class ParsedChoice(Choice):
    """One choice of a whole reply, read while it is collected."""

    def __init__(
        self, index: int, parser: OutputParser, *, show_reasoning: bool = True, named: bool = False
    ) -> None:
        super().__init__(index)
        self._named = named
        self._parser = parser
        self._show_reasoning = show_reasoning
        self._pieces: list[Piece] = []

    def add(self, event: TokenEvent) -> None:
        super().add(event)
        self._pieces += self._parser.push(event.text, event.token_ids)
        if event.finish_reason is not None:
            self._pieces += self._parser.finish()

    @property
    def reasoning_tokens(self) -> int:
        return self._parser.reasoning_tokens

    def chat(self, tokenizer: Tokenizer, with_logprobs: bool) -> dict[str, Any]:
        said = Message.of(self._pieces)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if not said.content and (said.calls or said.reasoning):
            message["content"] = None
        if said.calls:
            message["tool_calls"] = [_call(call) for call in said.calls]
        if said.reasoning and self._show_reasoning:
            message |= {"reasoning_content": said.reasoning, "reasoning": said.reasoning}
        return {
            **super().chat(tokenizer, with_logprobs),
            "message": message,
            **_ending(self.last, bool(said.calls) and not self._named),
        }


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _ending(event: TokenEvent, called: bool) -> dict[str, Any]:
    """A reply that ended of itself and has calls ended because of them, unless the caller named the call."""
    ending = ending_fields(event)
    if called and event.finish_reason is FinishReason.STOP:
        ending["finish_reason"] = TOOL_CALLS
    return ending
