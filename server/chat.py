"""Chat messages as templates expect them.

Knows roles and message fields; does not know tokens or HTTP. Rendering itself, and keeping control tokens
typed by users from becoming real ones, is the template's own work (engine.text).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.schema.chat import ChatMessage


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation as plain dictionaries, in order."""
    return [_plain(message) for message in messages]


def _plain(message: ChatMessage) -> dict[str, Any]:
    # "developer" is OpenAI's newer word for "system"; few templates know it.
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain
