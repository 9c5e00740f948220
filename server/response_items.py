"""Items of a conversation as the Responses API writes them, and the chat messages that they are.

Items are plain dictionaries here, in the one form in which they are stored, listed and read again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from server.chat import tool_call
from server.parsing.message import Call
from server.render import Fields
from server.schema.responses import Item, Part

COMPLETED = "completed"
INCOMPLETE = "incomplete"
IN_PROGRESS = "in_progress"

_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fc"}


def output_text(text: str) -> Fields:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def reasoning_text(text: str) -> Fields:
    return {"type": "reasoning_text", "text": text}


def _item(kind: str, status: str, **fields: Any) -> Fields:
    identity = f"{_ID_PREFIXES[kind]}_{secrets.token_hex(12)}"
    return {"type": kind, "id": identity, "status": status, **fields}


def message(text: str, status: str = COMPLETED) -> Fields:
    """One of the assistant's."""
    return _item("message", status, role="assistant", content=[output_text(text)])


def reasoning(text: str, status: str = COMPLETED) -> Fields:
    return _item("reasoning", status, summary=[], content=[reasoning_text(text)])


def function_call(call: Call, status: str = COMPLETED) -> Fields:
    return _item("function_call", status, call_id=call.id, name=call.name, arguments=call.arguments)


def from_input(item: Item) -> Fields:
    """An item that was sent."""
    text = _joined(item.content)
    if item.type == "reasoning":
        return reasoning(text)
    if item.type == "function_call":
        return function_call(Call(item.call_id or "", item.name or "", item.arguments or ""))
    if item.type == "function_call_output":
        return _item(item.type, COMPLETED, call_id=item.call_id, output=_joined(item.output))
    if item.role == "assistant":
        return message(text)
    return _item(item.type, COMPLETED, role=item.role, content=[{"type": "input_text", "text": text}])


def _joined(parts: Iterable[Part] | None) -> str:
    return "\n".join(part.words for part in parts or ())


def chat_messages(items: Iterable[Mapping[str, Any]]) -> list[Fields]:
    """What the assistant said in one turn, item by item, is one chat message."""
    messages: list[Fields] = []
    turn: Fields = {}

    def end_turn() -> None:
        nonlocal turn
        # Thoughts that led to nothing are nothing that templates could show.
        if "content" in turn or "tool_calls" in turn:
            messages.append({"role": "assistant", "content": "", **turn})
        turn = {}

    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            if "content" in turn or "tool_calls" in turn:
                end_turn()
            turn["reasoning_content"] = _text(item)
        elif kind == "function_call":
            if item["status"] == COMPLETED:
                call = tool_call(item["call_id"], item["name"], item["arguments"])
                turn.setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            end_turn()
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        elif item["role"] == "assistant":
            if "content" in turn:
                end_turn()
            turn["content"] = _text(item)
        else:
            end_turn()
            messages.append({"role": item["role"], "content": _text(item)})
    end_turn()
    return messages


def _text(item: Mapping[str, Any]) -> str:
    return "\n".join(part["text"] for part in item["content"])
