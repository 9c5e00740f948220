"""What streams send, for the API's description; render.py and its sisters write it.

One model for each API's events: which of the optional fields an event has, its type says.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.schema.cache import CacheExplanation
from server.schema.messages import MessagesReply, MessagesUsage
from server.schema.replies import (
    IDS,
    ChatFinish,
    ChatLogprobs,
    ChatUsage,
    Choice,
    CompletionLogprobs,
    Finish,
    Reply,
    Usage,
)
from server.schema.responses import ResponseObject

USAGE: Any = Field(None, description="With include_usage: in the last chunk, which has no choices.")
CACHE: Any = Field(None, description="With explain_cache: in a prompt's first chunk.")


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str = Field(description="The next part of a JSON object, as text.")


class ToolCallDelta(BaseModel):
    """The first of a call has its id and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = Field(None, description="In the first chunk of a choice.")
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="Another name of the same.")
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None


class CompletionChunkChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    prompt_token_ids: list[int] | None = IDS


class ChatChunk(Reply):
    """A part of a chat reply."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None = USAGE
    prompt_token_ids: list[int] | None = IDS
    cache: list[CacheExplanation] | None = CACHE


class CompletionChunk(Reply):
    """A part of a completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = USAGE
    cache: list[CacheExplanation] | None = CACHE


class ResponseEvent(BaseModel):
    """An event of a response."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.output_item.added",
        "response.output_item.done",
        "response.content_part.added",
        "response.content_part.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
    ]
    sequence_number: int
    response: ResponseObject | None = Field(None, description="As it is now.")
    output_index: int | None = None
    item: dict[str, Any] | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: dict[str, Any] | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[Any] | None = None
    cache: list[CacheExplanation] | None = CACHE


class StartedMessage(MessagesReply):
    """A message of which nothing is written yet."""

    stop_reason: None  # type: ignore[assignment]


class MessageEnding(BaseModel):
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None


class MessageDelta(BaseModel):
    type: Literal["text_delta", "thinking_delta", "input_json_delta"]
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None


class MessageEvent(BaseModel):
    """An event of a message."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]
    message: StartedMessage | None = None
    index: int | None = None
    content_block: dict[str, Any] | None = None
    delta: MessageDelta | MessageEnding | None = None
    usage: MessagesUsage | None = None
    cache: list[CacheExplanation] | None = CACHE
