"""Which notation a model uses, told from the source of its chat template.

A template shows the model how to write calls and thoughts, so the marks of the notation stand in it. Knows
templates as text only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from server.parsing.reasoning import REASONING_TAGS

# Variables that a request may set, if the template looks at them.
_VARIABLES = ("tools", "reasoning_effort", "enable_thinking")
# Notations that share a mark with one of ours.
_NOT_HERMES = ("<function=", "<arg_key>", "<parameter=", "<invoke ")


@dataclass(frozen=True, slots=True)
class Detected:
    """What a template says of its model.

    Attributes:
        reads: those of the variables tools, reasoning_effort and enable_thinking that it looks at.
        tool_format, reasoning_format: names, or None where there is none that we know.
    """

    reads: frozenset[str] = frozenset()
    tool_format: str | None = None
    reasoning_format: str | None = None


def detect(templates: Mapping[str, str]) -> Detected:
    """Looks at a model's templates by name; the one for tools is asked first."""
    sources = [text for name, text in sorted(templates.items(), key=lambda item: item[0] != "tool_use")]
    return Detected(
        reads=frozenset(
            name for name in _VARIABLES if any(re.search(rf"\b{name}\b", source) for source in sources)
        ),
        tool_format=next((found for source in sources if (found := _tool_format(source))), None),
        reasoning_format=next((found for source in sources if (found := _reasoning_format(source))), None),
    )


def _tool_format(source: str) -> str | None:
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<tool_call>" in source:
        return None if any(mark in source for mark in _NOT_HERMES) else "hermes"
    if "[func_name1(" in source:
        return "pythonic"
    if '{"name": function name, "parameters":' in source:
        return "llama3_json"
    if "<|python_start|>" in source:
        return "pythonic"
    if "<|python_tag|>" in source:
        return "llama3_json"
    return None


def _reasoning_format(source: str) -> str | None:
    return next((name for name, tags in REASONING_TAGS.items() if tags.close in source), None)
