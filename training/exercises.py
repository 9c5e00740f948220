"""The lists that score tools and JSON: `tasks_heldout.jsonl` and `tasks_dev.jsonl`.

Knows: what a line means. Does not know: the model.

A line has a `question` and one of these: `json`, the object that the reply must be; `tools` (signatures) and
`call`, a name and arguments; `tools` and `intent`, what the book says instead of a call; `tools`, `call`,
`result` and `says`, parts of the answer once the tool has returned that.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.dataset import Book
from training.tasks import Message, Span, form, tool

Row = dict[str, Any]
_SIGNATURE = re.compile(r"(?P<name>\w+)\((?P<keys>[^)]*)\)")


@dataclass(frozen=True)
class Exercise:
    """A prompt and what must follow.

    Attributes:
        answer: the text that must follow, or `says`: what it must contain.
        given: ranges of characters of the answer that a grammar writes.
    """

    messages: list[Message]
    tools: list[dict[str, Any]]
    answer: str = ""
    given: Sequence[Span] = ()
    says: Sequence[str] = ()


def exercise(row: Row, book: Book) -> Exercise:
    """Reads a line."""
    asked = [{"role": "user", "content": row["question"]}]
    tools = [signature(text) for text in row.get("tools", ())]
    if "json" in row:
        return Exercise(asked, tools, json.dumps(row["json"]), form(row["json"]))
    if "intent" in row:
        return Exercise(asked, tools, book.answer(row["intent"]))
    if "says" not in row:
        return Exercise(asked, tools, f"<tool_call>\n{json.dumps(row['call'])}\n</tool_call>")
    calls = [{"type": "function", "function": row["call"]}]
    asked.append({"role": "assistant", "content": "", "tool_calls": calls})
    return Exercise([*asked, {"role": "tool", "content": row["result"]}], tools, says=row["says"])


def signature(text: str) -> dict[str, Any]:
    """A tool from `name(key: type, key: type)`."""
    match = _SIGNATURE.fullmatch(text)
    if match is None:
        raise ValueError(f"not the signature of a tool: {text}")
    pairs = [part.split(": ") for part in match["keys"].split(", ") if part]
    return tool(match["name"], {key: {"type": kind} for key, kind in pairs})


def schema(wanted: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object, as a request would send it."""
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number"}
    properties = {key: {"type": kinds[type(value)]} for key, value in wanted.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": list(wanted),
        "additionalProperties": False,
    }
