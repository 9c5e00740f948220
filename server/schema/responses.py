"""What POST /v1/responses takes, and what its endpoints answer: OpenAI's Responses API.

Knows its shapes; what they mean in the words of the chat API is said in server.translate_responses. Input is
text, calls of functions and their outputs, and thoughts; what else there is, is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from server.schema import conditions
from server.schema.cache import CacheExplanation
from server.schema.chat import MAX_MESSAGES, Effort, TemplateKwargs
from server.schema.common import CACHE_SALT, INT32_MAX, PRIORITY, CacheSalt, WireModel, field_error
from server.schema.or_text import OrText
from server.schema.tools import MAX_ID_CHARS, MAX_TOOLS, NAME, choice_schema, settle

MAX_PARTS = 2048
MAX_METADATA = 16

_NEEDS = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


def _as_parts(value: Any) -> Any:
    return _or_list(value, {"type": "input_text", "text": value}, "parts")


def _as_items(value: Any) -> Any:
    return _or_list(value, {"role": "user", "content": value}, "items")


def _or_list(value: Any, alone: Any, of: str) -> Any:
    if isinstance(value, str):
        return [alone]
    if not isinstance(value, list):
        raise field_error(f"must be a string or a list of {of}")
    return value


_PARTS = {
    **dict.fromkeys(("input_text", "output_text", "reasoning_text", "text"), ("text",)),
    "refusal": ("refusal",),
}


class Part(WireModel):
    """Text. Images, files and audio are not read."""

    model_config = ConfigDict(json_schema_extra=conditions.by_type(_PARTS))

    type: Literal["input_text", "output_text", "reasoning_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = Field(None, description="Of type refusal, in place of text.")

    @model_validator(mode="after")
    def _complete(self) -> Part:
        (name,) = _PARTS[self.type]
        if getattr(self, name) is None:
            raise field_error(f"a part of type {self.type} needs it", name)
        return self

    @property
    def words(self) -> str:
        return self.text or self.refusal or ""


Parts = Annotated[list[Part], BeforeValidator(_as_parts), Field(max_length=MAX_PARTS), OrText()]


class Item(WireModel):
    """One item of the input; each type has fields of its own."""

    model_config = ConfigDict(json_schema_extra=conditions.by_type(_NEEDS, default="message"))

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = Field(
        None, description="Of a message."
    )
    content: Parts | None = Field(None, description="Of a message: a string or parts. Of reasoning: parts.")
    call_id: str | None = Field(None, min_length=1, max_length=MAX_ID_CHARS)
    name: str | None = Field(None, min_length=1, max_length=256, description="Of a function that was called.")
    arguments: str | None = Field(None, description="A JSON object, as text.")
    output: Parts | None = Field(None, description="What the function answered: a string or parts.")
    id: str | None = Field(None, max_length=MAX_ID_CHARS)
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Item:
        for name in _NEEDS[self.type]:
            if getattr(self, name) is None:
                raise field_error(f"an item of type {self.type} needs it", name)
        return self


class ResponseTool(WireModel):
    """A function that the model may call. Tools that OpenAI's servers run are not known here."""

    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = Field(None, description="true: arguments keep to the schema.")


def _check_choice(value: Any) -> Any:
    """Stays as it was sent: replies repeat it."""
    settle(value, bare=True)
    return value


ToolChoice = Annotated[Any, BeforeValidator(_check_choice), WithJsonSchema(choice_schema(bare=True))]


class ReasoningOptions(WireModel):
    effort: Effort | None = Field(None, description="For models whose chat template knows it.")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Taken and ignored: thoughts come whole, as reasoning_text."
    )


class TextFormat(WireModel):
    model_config = ConfigDict(
        json_schema_extra=conditions.by_type(
            {"text": (), "json_object": (), "json_schema": ("name", "schema")}
        )
    )

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=NAME, description="With type json_schema.")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="With type json_schema.")
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> TextFormat:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise field_error("type json_schema needs it", "schema" if self.name else "name")
        return self


class TextOptions(WireModel):
    format: TextFormat | None = Field(None, description="What the text must be.")
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="`medium` only.", json_schema_extra={"enum": ["medium", None]}
    )


class ResponseStreamOptions(WireModel):
    include_obfuscation: bool | None = Field(None, description="Taken and ignored: events are never padded.")


class ResponsesRequest(WireModel):
    """A conversation to continue, in the words of OpenAI's Responses API."""

    refused: ClassVar = {
        "background": (False,),
        "conversation": (),
        "context_management": ([],),
        "moderation": (),
        "prompt": (),
        "service_tier": ("auto", "default"),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str | None = Field(None, description="A name from /v1/models; left out: the served model.")
    input: Annotated[
        list[Item], BeforeValidator(_as_items), Field(min_length=1, max_length=MAX_MESSAGES), OrText()
    ]
    instructions: str | None = Field(None, description="A system message before everything, this time only.")
    previous_response_id: str | None = Field(
        None, min_length=1, max_length=MAX_ID_CHARS, description="Goes on after that response."
    )
    store: bool | None = Field(True, description="Keep the response, so that it can be asked for.")
    stream: bool | None = Field(False, description="Server-sent events, from response.created on.")
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(
        None, ge=1, le=INT32_MAX, description="Most tokens to generate, thoughts included."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; left out: the model's own.")
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[ResponseTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = Field(
        None, description="none, auto, required, or an object that names functions."
    )
    parallel_tool_calls: bool | None = Field(True, description="false: one call at most.")
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(
        None, description="Taken and ignored: thoughts are never encrypted."
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = (
        Field(None, max_length=MAX_METADATA, description="Kept with the response.")
    )
    max_tool_calls: int | None = Field(None, ge=1, description="Taken and ignored: no tool is run here.")
    user: str | None = Field(None, description="Taken and ignored.")
    safety_identifier: str | None = Field(None, description="Taken and ignored.")
    prompt_cache_key: str | None = Field(
        None, description="Taken and ignored: the prefix cache needs no key."
    )
    prompt_cache_options: Any = Field(None, description="Taken and ignored.")
    prompt_cache_retention: str | None = Field(None, description="Taken and ignored.")
    background: bool | None = Field(False, description="`false` only.")
    conversation: Any = Field(None, description="Not supported: use previous_response_id.")
    context_management: Any = Field(None, description="Not supported.")
    moderation: Any = Field(None, description="Not supported.")
    prompt: Any = Field(None, description="Not supported: templates are not kept here.")
    truncation: str | None = Field("disabled", description="`disabled` only.")
    service_tier: str | None = Field(None, description="`auto` or `default`.")
    top_logprobs: int | None = Field(None, description="0 only.")
    chat_template_kwargs: TemplateKwargs = Field(
        default_factory=dict, description="Variables for the chat template."
    )
    priority: int | None = PRIORITY
    cache_salt: CacheSalt = CACHE_SALT
    explain_cache: bool | None = Field(
        False, description="Say in `cache` what of the prompt was reused, and why not more."
    )


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(BaseModel):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "in_progress", "failed", "cancelled"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]] = Field(description="Items of type reasoning, message and function_call.")
    usage: ResponseUsage | None = None
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    text: dict[str, Any]
    store: bool
    background: Literal[False]
    truncation: Literal["disabled"]
    service_tier: Literal["default"]
    metadata: dict[str, str]
    cache: list[CacheExplanation] | None = None


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"]
    input_tokens: int = Field(description="Tokens of the whole prompt, as the chat template writes it.")


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(BaseModel):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool
