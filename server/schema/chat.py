"""What POST /v1/chat/completions takes.

Knows messages and the chat API's own fields; does not know templates. Content is text: a string or a list
of text parts. Images and audio are refused by name until something can honour them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from engine.types import MAX_LOGPROBS
from server.schema import conditions
from server.schema.common import INT32_MAX, WireModel, field_error
from server.schema.structured import ConstrainedRequest
from server.schema.tools import MAX_ID_CHARS, MAX_TOOL_CALLS, MAX_TOOLS, Tool, ToolCall, ToolChoice

MAX_MESSAGES = 2048
MAX_TEMPLATE_KWARGS = 16

# What the template gets from us; a request may not put something else in its place.
_RESERVED_KWARGS = frozenset(
    {
        *("messages", "tools", "documents", "conversation", "tokenize", "tokenizer", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"),
        *("bos_token", "eos_token", "pad_token", "unk_token"),
    }
)
_KWARG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_KWARG_TEXT = re.compile(r"[A-Za-z0-9 _.-]{0,64}")

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "input_text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


def _parse_content(value: Any) -> Any:
    """A string, or a list of text parts joined by line breaks."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise field_error("must be a string or a list of text parts")
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise field_error('each part must be an object such as {"type": "text", "text": "..."}')
    if part["type"] not in ("text", "input_text"):
        raise field_error("holds a part that is not text; this model reads text only")
    if not isinstance(part.get("text"), str):
        raise field_error("a text part needs a string in `text`")
    return str(part["text"])


def _parse_template_kwargs(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_KWARGS:
        raise field_error(f"must be an object with at most {MAX_TEMPLATE_KWARGS} entries")
    for name, inner in value.items():
        if not _KWARG_NAME.fullmatch(name) or name in _RESERVED_KWARGS:
            raise field_error("names a variable that a request may not set")
        plain = inner is None or isinstance(inner, (bool, int))
        if not plain and not (isinstance(inner, str) and _KWARG_TEXT.fullmatch(inner)):
            raise field_error("values must be true, false, null, whole numbers or short words")
    return value


Content = Annotated[
    str | None,
    BeforeValidator(_parse_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": _TEXT_PART},
                {"type": "null"},
            ]
        }
    ),
]
TemplateKwargs = Annotated[
    dict[str, Any],
    BeforeValidator(_parse_template_kwargs),
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "maxProperties": MAX_TEMPLATE_KWARGS,
            "propertyNames": {
                "pattern": f"^{_KWARG_NAME.pattern}$",
                "not": {"enum": sorted(_RESERVED_KWARGS)},
            },
            "additionalProperties": {
                "anyOf": [
                    {"type": ["boolean", "integer", "null"]},
                    {"type": "string", "pattern": f"^{_KWARG_TEXT.pattern}$"},
                ]
            },
        }
    ),
]


_TOLD = {"content": conditions.GIVEN, "tool_calls": conditions.NO_ITEMS}
_BY_ROLE: conditions.Words = {
    "anyOf": [
        conditions.case({"role": {"const": "assistant"}}),
        conditions.case({"role": {"enum": ["system", "developer", "user"]}, **_TOLD}, ["content"]),
        conditions.case(
            {"role": {"const": "tool"}, **_TOLD, "tool_call_id": conditions.GIVEN},
            ["content", "tool_call_id"],
        ),
    ]
}


class ChatMessage(WireModel):
    """One turn. What our own replies carry besides content (refusal, annotations) is taken back as null."""

    model_config = ConfigDict(json_schema_extra=_BY_ROLE)
    refused: ClassVar = {"function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = Field(None, description="Text, or a list of text parts.")
    name: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOL_CALLS, description="Assistant only.")
    tool_call_id: str | None = Field(None, max_length=MAX_ID_CHARS, description="Which call a tool answers.")
    reasoning_content: str | None = Field(None, description="Assistant only: what it thought before.")
    reasoning: str | None = Field(None, description="Another name of the same.")

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in cls.refused:
                if value.get(name) is not None:
                    raise field_error("not supported by this server", name)
        return value

    @model_validator(mode="after")
    def _complete(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise field_error(f"a {self.role} message needs it", "content")
        if self.role == "tool" and self.tool_call_id is None:
            raise field_error("a tool message needs it", "tool_call_id")
        if self.tool_calls and self.role != "assistant":
            raise field_error("only an assistant message has it", "tool_calls")
        return self


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Conversation(WireModel):
    """What makes the prompt, besides the messages."""

    add_generation_prompt: bool | None = Field(True, description="Begin the assistant's turn.")
    continue_final_message: bool | None = Field(
        False, description="Go on from the text of the last message; begins no turn."
    )
    chat_template_kwargs: TemplateKwargs = Field(
        default_factory=dict, description="Variables for the chat template, such as enable_thinking."
    )
    tools: list[Tool] | None = Field(
        None, max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: ToolChoice = Field(
        None, description="auto, the default with tools, none, required, or an object that names functions."
    )
    parallel_tool_calls: bool | None = Field(True, description="false: one call at most.")
    reasoning_effort: Effort | None = Field(
        None,
        description="For models whose template knows it; with those that only switch, none is off. "
        "Others: none or medium.",
    )

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and (self.tool_choice is None or self.tool_choice.mode != "none")

    @property
    def must_call(self) -> bool:
        return self.tool_choice is not None and self.tool_choice.mode == "required"


class ChatRequest(Conversation, ConstrainedRequest):
    """A conversation to continue."""

    refused: ClassVar = {
        **ConstrainedRequest.refused,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "web_search_options": (),
        "moderation": (),
        "verbosity": ("medium",),
        "service_tier": ("auto", "default"),
        "documents": ([],),
        "echo": (False,),
        "mm_processor_kwargs": ({},),
        "add_special_tokens": (False,),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32_MAX, description="Most tokens to generate; left out: up to the model's context."
    )
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX, description="The older name of the same.")
    logprobs: bool | None = Field(False, description="Log probability of each generated token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Likeliest alternatives beside each token; needs logprobs."
    )
    include_reasoning: bool | None = Field(True, description="false: leave out what the model thought.")
    # Taken as OpenAI clients send them; they ask for nothing that changes the answer.
    store: bool | None = Field(
        False, description="Taken and ignored: nothing is stored; true is named in `x-quire-warnings`."
    )
    metadata: dict[str, str] | None = Field(None, max_length=64, description="Taken and ignored.")
    function_call: Any = Field(None, description="`none` or `auto` only: use tool_choice.")
    functions: Any = Field(None, description="Empty or left out: use tools.")
    modalities: Any = Field(None, description='Only ["text"].')
    verbosity: str | None = Field(None, description="`medium` only.")
    service_tier: str | None = Field(None, description="`auto` or `default`.")
    safety_identifier: str | None = Field(None, description="Taken and ignored.")
    prompt_cache_key: str | None = Field(
        None, description="Taken and ignored: the prefix cache needs no key."
    )
    prediction: Any = Field(None, description="Taken and ignored: it could only save time.")
    prompt_cache_options: Any = Field(None, description="Taken and ignored.")
    prompt_cache_retention: str | None = Field(None, description="Taken and ignored.")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("needs logprobs to be true", "top_logprobs")
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise field_error("differs from max_completion_tokens; send one of them", "max_tokens")
        if self.may_call and not self.must_call and self.constrained and not self.wants_json:
            raise field_error(
                "of formats only JSON can be combined with tools that may be called: send tool_choice none",
                super().grammar_field,
            )
        return self

    @property
    def grammar_field(self) -> str:
        return super().grammar_field if self.constrained and not self.must_call else "tools"

    @property
    def ungranted_fields(self) -> list[str]:
        return ["store"] if self.store else []

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """SamplingParams.logprobs: None, or how many alternatives to return."""
        return (self.top_logprobs or 0) if self.logprobs else None
