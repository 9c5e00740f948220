"""Requests of the Responses API in the words of the chat API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import invalid
from server.render import Fields
from server.response_items import chat_messages
from server.schema.responses import ResponsesRequest, TextOptions
from server.schema.tools import settle
from server.translate import Translated, chat_tool, json_schema, translated

NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}


@dataclass(frozen=True, slots=True)
class Context:
    """What the chat API does not know of a response.

    Attributes:
        tenant: whose it is.
        inputs: the items that were sent, as they are stored.
    """

    tenant: str
    inputs: Sequence[Fields]


def from_responses(
    request: ResponsesRequest, earlier: Sequence[Fields], inputs: Sequence[Fields], tenant: str
) -> Translated:
    """Translates a request.

    Args:
        earlier: the items of the conversation that it goes on.

    Raises:
        ApiError: 400, for what cannot be honoured.
    """
    messages = chat_messages([*earlier, *inputs])
    if not messages:
        raise invalid("input: has nothing but thoughts; send a message with them.", "input")
    if request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
    tools = [
        chat_tool(tool.name, tool.description, tool.parameters, tool.strict) for tool in request.tools or ()
    ]
    fields: Fields = {
        "model": request.model,
        "messages": messages,
        "tools": tools or None,
        "tool_choice": settle(request.tool_choice, bare=True),
        "parallel_tool_calls": request.parallel_tool_calls,
        "reasoning_effort": request.reasoning.effort if request.reasoning is not None else None,
        "max_tokens": request.max_output_tokens,
        "stream": request.stream,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "priority": request.priority,
        "cache_salt": request.cache_salt,
        "explain_cache": request.explain_cache,
        "chat_template_kwargs": request.chat_template_kwargs,
        **_text(request.text),
    }
    return translated(request, fields, Context(tenant, inputs))


def _text(options: TextOptions | None) -> Fields:
    if options is None:
        return {}
    wanted, fields = options.format, {"verbosity": options.verbosity}
    if wanted is None:
        return fields
    if wanted.type == "json_schema":
        return {**fields, "response_format": json_schema(wanted.name or "", wanted.schema_)}
    return {**fields, "response_format": {"type": wanted.type}}
