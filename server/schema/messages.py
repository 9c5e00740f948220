"""What POST /v1/messages and /v1/messages/count_tokens take: Anthropic's API.

Knows its shapes; what they mean in the words of the chat API, which both are served by, is said in
server.translate. Content is text, thoughts, calls and their results; what else there is, is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from engine.types import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS
from server.schema import conditions
from server.schema.cache import CacheExplanation
from server.schema.chat import MAX_MESSAGES, TemplateKwargs
from server.schema.common import CACHE_SALT, INT32_MAX, PRIORITY, CacheSalt, WireModel, field_error
from server.schema.conditions import case
from server.schema.or_text import OrText
from server.schema.tools import MAX_ID_CHARS, MAX_TOOL_CALLS, MAX_TOOLS, NAME

MAX_BLOCKS = 2048

_NEEDS = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
_OF_ROLE = {"user": ("text", "tool_result"), "assistant": tuple(_NEEDS)[:4]}


def _as_blocks(value: Any) -> Any:
    """A string is one block of text."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise field_error("must be a string or a list of blocks")
    return value


class TextBlock(WireModel):
    """Text. `cache_control` is taken and ignored: whatever has been computed is reused."""

    type: Literal["text"]
    text: str


Texts = Annotated[list[TextBlock], BeforeValidator(_as_blocks), Field(max_length=MAX_BLOCKS), OrText()]


class Block(WireModel):
    """Part of a turn; each type has fields of its own. Images and documents are not read."""

    model_config = ConfigDict(json_schema_extra=conditions.by_type(_NEEDS))

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = Field(None, description="What the assistant thought before.")
    id: str | None = Field(None, min_length=1, max_length=MAX_ID_CHARS, description="Of a tool_use.")
    name: str | None = Field(None, min_length=1, max_length=256, description="Of the tool.")
    input: dict[str, Any] | None = Field(None, description="The call's arguments.")
    tool_use_id: str | None = Field(
        None, min_length=1, max_length=MAX_ID_CHARS, description="Which call a tool_result answers."
    )
    content: Texts | None = Field(None, description="Of a tool_result: a string or text blocks.")
    is_error: bool | None = Field(False, description="Of a tool_result; taken and ignored.")

    @model_validator(mode="after")
    def _complete(self) -> Block:
        for name in _NEEDS[self.type]:
            if getattr(self, name) is None:
                raise field_error(f"a {self.type} block needs it", name)
        return self


def _blocks_of(role: str) -> conditions.Words:
    types = case({"type": {"enum": list(_OF_ROLE[role])}})
    return case({"role": {"const": role}, "content": {"items": types}})


class Turn(WireModel):
    """One message."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_blocks_of(role) for role in _OF_ROLE]})

    role: Literal["user", "assistant"]
    content: Annotated[
        list[Block],
        BeforeValidator(_as_blocks),
        Field(min_length=1, max_length=MAX_BLOCKS),
        OrText(),
    ]

    @model_validator(mode="after")
    def _of_its_role(self) -> Turn:
        for position, block in enumerate(self.content):
            if block.type not in _OF_ROLE[self.role]:
                raise field_error(
                    f"{self.role} messages have no {block.type} blocks", f"content[{position}].type"
                )
        calls = sum(block.type == "tool_use" for block in self.content)
        if calls > MAX_TOOL_CALLS:
            raise field_error(f"has {calls} tool_use blocks; at most {MAX_TOOL_CALLS}", "content")
        return self


class ClientTool(WireModel):
    """A function that the model may call. Tools that Anthropic's servers run are not known here."""

    type: Literal["custom"] | None = "custom"
    name: str = Field(pattern=NAME)
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="A JSON schema of the arguments.")
    strict: bool | None = Field(None, description="true: arguments keep to the schema.")


class PickTool(WireModel):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                case({"type": {"const": "tool"}, "name": conditions.GIVEN}, ["name"]),
                case({"type": {"enum": ["auto", "any", "none"]}, "name": conditions.NOTHING}),
            ]
        }
    )

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="With type tool.")
    disable_parallel_tool_use: bool | None = Field(False, description="true: one call at most.")

    @model_validator(mode="after")
    def _complete(self) -> PickTool:
        if (self.type == "tool") != (self.name is not None):
            raise field_error("goes with type tool", "name")
        return self


class Thinking(WireModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(
        None, ge=1, le=INT32_MAX, description="Taken and ignored: thoughts end where the model ends them."
    )


class OutputConfig(WireModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="For models whose chat template knows it."
    )
    format: dict[str, Any] | None = Field(
        None,
        description="{type: json_schema, schema: ...}.",
        json_schema_extra=case(
            {"type": {"const": "json_schema"}, "schema": {"type": "object"}}, ["type", "schema"]
        ),
    )

    @model_validator(mode="after")
    def _known_format(self) -> OutputConfig:
        wanted = self.format
        if wanted is not None and (
            wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict)
        ):
            raise field_error('must be {"type": "json_schema", "schema": {...}}', "format")
        return self


class CountTokensRequest(WireModel):
    """What makes the prompt."""

    refused: ClassVar = {"mcp_servers": ([],), "container": (), "context_management": ()}

    model: str | None = Field(None, description="A name from /v1/models; left out: the served model.")
    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Texts | None = Field(None, description="A string or text blocks.")
    tools: list[ClientTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: PickTool | None = None
    thinking: Thinking | None = Field(None, description="Left out: as the model's template has it.")
    output_config: OutputConfig | None = None
    chat_template_kwargs: TemplateKwargs = Field(
        default_factory=dict, description="Variables for the chat template."
    )
    mcp_servers: Any = Field(None, description="Not supported.")
    container: Any = Field(None, description="Not supported.")
    context_management: Any = Field(None, description="Not supported.")


class MessagesRequest(CountTokensRequest):
    """A conversation to continue, in Anthropic's words."""

    max_tokens: int = Field(ge=1, le=INT32_MAX, description="Most tokens to generate.")
    stream: bool | None = Field(False, description="Server-sent events, from message_start to message_stop.")
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_CHARS)]] | None = (
        Field(None, max_length=MAX_STOP_STRINGS, description="Strings that end the reply.")
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; left out: the model's own.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX)
    metadata: dict[str, Any] | None = Field(None, description="Taken and ignored.")
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description="Taken and ignored.")
    cache_control: Any = Field(None, description="Taken and ignored: whatever has been computed is reused.")
    priority: int | None = PRIORITY
    cache_salt: CacheSalt = CACHE_SALT
    explain_cache: bool | None = Field(
        False, description="Say in `cache` what of the prompt was reused, and why not more."
    )


class TextReply(BaseModel):
    type: Literal["text"]
    text: str


class ThinkingReply(BaseModel):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseReply(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessagesUsage(BaseModel):
    input_tokens: int = Field(description="Tokens of the prompt that had to be computed.")
    cache_read_input_tokens: int = Field(description="Tokens of the prompt that were reused.")
    cache_creation_input_tokens: int
    output_tokens: int


class MessagesReply(BaseModel):
    """The answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextReply | ThinkingReply | ToolUseReply]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessagesUsage
    cache: list[CacheExplanation] | None = None


class CountTokensReply(BaseModel):
    input_tokens: int = Field(description="Tokens of the whole prompt, as the chat template writes it.")
