"""Requests of other APIs in the words of the chat API, which serves them all.

Knows both sides' shapes; does not know how replies are written. What the other API asks for and chat cannot
say is refused here, by the other API's name of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from engine.errors import QuireError
from server.chat import tool_call
from server.errors import ApiError, invalid, to_api_error
from server.parsing.chosen import Notations
from server.schema.chat import ChatRequest
from server.schema.common import WireModel, parse
from server.schema.messages import Block, CountTokensRequest, MessagesRequest, PickTool, TextBlock, Turn

Fields = dict[str, Any]

_HEAD = re.compile(r"\w+")
_FUNCTION = re.compile(r"^(\[\d+\])\.function\b")


class Translated(ChatRequest):
    """A request of another API. `source` is what was sent; `context` is what else its API has to know."""

    source: Any
    context: Any = None


def translated(source: WireModel, fields: Mapping[str, Any], context: Any = None) -> Translated:
    """Checks the translation as if it had been sent; fields without a value are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    return parse(Translated, {**given, "source": source, "context": context})


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error about a field by the name it has in the request: `names` has chat's first."""
    if error.param is None:
        return error
    old = error.param
    head = _HEAD.match(old)
    if head is not None:
        # Only the chat API has a function inside each tool.
        error.param = names.get(head[0], head[0]) + _FUNCTION.sub(r"\1", old[head.end() :])
    if error.message.startswith(old):
        error.message = error.param + error.message.removeprefix(old)
    return error


@contextmanager
def naming(names: Mapping[str, str] | None) -> Iterator[None]:
    """Errors on the way name fields as the request does; None: they do so anyway."""
    try:
        yield
    except (ApiError, QuireError) as exc:
        if names is None:
            raise
        raise renamed(to_api_error(exc), names) from exc


def from_messages(request: CountTokensRequest, notations: Notations) -> Translated:
    """Anthropic's.

    Raises:
        ApiError: 400, for what cannot be honoured.
    """
    output, choice = request.output_config, request.tool_choice
    effort = output.effort if output is not None else None
    tools = [
        chat_tool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in request.tools or ()
    ]
    fields: Fields = {
        "model": request.model,
        "messages": [*_system(request), *(message for turn in request.messages for message in _turn(turn))],
        "tools": tools or None,
        # A turn that the caller has begun for the model.
        "continue_final_message": request.messages[-1].role == "assistant",
        "tool_choice": _choice(choice),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "reasoning_effort": effort,
        **_thinking(request, notations),
    }
    if output is not None and output.format is not None:
        fields["response_format"] = json_schema("format", output.format["schema"])
    if isinstance(request, MessagesRequest):
        fields |= {
            "max_tokens": request.max_tokens,
            "stream": request.stream,
            "stop": request.stop_sequences,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "priority": request.priority,
            "cache_salt": request.cache_salt,
            "explain_cache": request.explain_cache,
        }
    return translated(request, fields)


def _system(request: CountTokensRequest) -> list[Fields]:
    return [{"role": "system", "content": _text(request.system)}] if request.system else []


def _turn(turn: Turn) -> Iterable[Fields]:
    """A user's turn may hold answers of tools, which are messages of their own in the chat API."""
    if turn.role == "assistant":
        yield _assistant(turn.content)
        return
    texts: list[Block] = []
    for block in turn.content:
        if block.type == "text":
            texts.append(block)
            continue
        if texts:
            yield {"role": "user", "content": _text(texts)}
            texts = []
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or ())}
    if texts:
        yield {"role": "user", "content": _text(texts)}


def _assistant(blocks: Sequence[Block]) -> Fields:
    calls = [
        tool_call(block.id or "", block.name or "", json.dumps(block.input, ensure_ascii=False))
        for block in blocks
        if block.type == "tool_use"
    ]
    thoughts = "\n".join(block.thinking or "" for block in blocks if block.type == "thinking")
    return {
        "role": "assistant",
        "content": _text([block for block in blocks if block.type == "text"]),
        **({"reasoning_content": thoughts} if thoughts else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _text(blocks: Iterable[Block | TextBlock]) -> str:
    return "\n".join(block.text or "" for block in blocks)


def chat_tool(name: str, description: str | None, schema: Any, strict: bool | None) -> Fields:
    function = {"name": name, "description": description, "parameters": schema, "strict": strict}
    return {"type": "function", "function": function}


def json_schema(name: str, schema: Any) -> Fields:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def _choice(choice: PickTool | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _thinking(request: CountTokensRequest, notations: Notations) -> Fields:
    """On or off as the model's template can be told, or as the model is."""
    wanted, variables = request.thinking, dict(request.chat_template_kwargs)
    fields: Fields = {"chat_template_kwargs": variables}
    if wanted is None or wanted.type == "adaptive":
        return fields
    if wanted.type == "disabled":
        return {**fields, "reasoning_effort": "none"}
    if "enable_thinking" in notations.reads:
        variables.setdefault("enable_thinking", True)
    elif notations.reasoning is None and "reasoning_effort" not in notations.reads:
        raise invalid("thinking: this model does not think.", "thinking", "unsupported_parameter")
    return fields
