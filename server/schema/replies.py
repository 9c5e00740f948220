"""What the two generation APIs answer, for the API's description; render.py writes the replies."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.schema.cache import CacheExplanation

Finish = Literal["stop", "length"]
ChatFinish = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class ChatUsage(Usage):
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob] | None
    refusal: None


class FunctionCall(BaseModel):
    name: str
    arguments: str = Field(description="A JSON object, as text.")


class AssistantToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[AssistantToolCall] | None = None
    reasoning_content: str | None = Field(None, description="What the model thought before its answer.")
    reasoning: str | None = Field(None, description="Another name of the same.")


class PromptTokenLogprob(BaseModel):
    logprob: float
    rank: int | None = Field(description="Null where it is not among the likeliest that were asked for.")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]
IDS: Any = Field(None, description="With return_token_ids.")


class Choice(BaseModel):
    """What all choices have, of whole replies and of chunks."""

    index: int
    stop_reason: int | str | None = None
    token_ids: list[int] | None = IDS


class Reply(BaseModel):
    """What all replies have, and all chunks."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatChoice(Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish


class ChatReply(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: ChatUsage
    prompt_logprobs: PromptLogprobs | None = Field(None, description="By token id; the first has none.")
    prompt_token_ids: list[int] | None = IDS
    cache: list[CacheExplanation] | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    prompt_logprobs: PromptLogprobs | None = Field(None, description="By token id; the first has none.")
    prompt_token_ids: list[int] | None = IDS


class CompletionReply(Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    cache: list[CacheExplanation] | None = None
