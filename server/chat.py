"""Chat messages as templates expect them.

Knows roles and message fields; does not know tokens or HTTP. Rendering itself, and keeping control tokens
typed by users from becoming real ones, is the template's own work (engine.text).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.schema.chat import ChatMessage

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


def template_messages(messages: Sequence[ChatMessage], *, short_ids: bool = False) -> list[dict[str, Any]]:
    """The conversation as plain dictionaries, in order.

    Args:
        short_ids: ids of calls become nine letters and digits, the only ones that Mistral's templates take.
    """
    names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    return [_plain(message, names, short_ids) for message in messages]


def _plain(message: ChatMessage, names: Mapping[str, str], short_ids: bool) -> dict[str, Any]:
    # "developer" is OpenAI's newer word for "system"; few templates know it.
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": message.content or ""}
    # Some templates want a tool's answer to say whose it is; OpenAI's clients only send the call's id.
    name = message.name or names.get(message.tool_call_id or "")
    if name is not None:
        plain["name"] = name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = _id(message.tool_call_id, short_ids)
    # Templates ask whether there is such a field at all.
    if message.tool_calls:
        plain["tool_calls"] = [
            tool_call(_id(call.id, short_ids), call.function.name, call.function.arguments)
            for call in message.tool_calls
        ]
    thoughts = message.reasoning_content or message.reasoning
    if thoughts and role == "assistant":
        plain["reasoning_content"] = thoughts
    return plain


def tool_call(identity: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as the chat API writes it; templates, too."""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _id(call_id: str, short: bool) -> str:
    if not short or _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:9]


def with_arguments(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same with the arguments of calls as objects, which is what templates write; slow if they are long.

    What is no JSON object stays as it was written: a model may have written it.
    """
    return [
        {**message, "tool_calls": [_parsed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _parsed(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def size(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> int:
    """How many characters of the caller's a prompt will have, nearly."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    return (
        sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in messages)
        + sum(len(call["function"]["arguments"]) + len(call["function"]["name"]) for call in calls)
        + sum(len(json.dumps(tool)) for tool in tools)
    )
