"""Which notation a model uses, told from the source of its chat template.

A template shows the model how to write calls and thoughts, so the marks of the notation stand in it. Knows
templates as text only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from server.parsing.reasoning import REASONING_TAGS

# Variables that a request may set, if the template looks at them.
_VARIABLES = ("tools", "reasoning_effort", "enable_thinking")
# Notations that share a mark with one of ours.
_NOT_HERMES = ("<function=", "<arg_key>", "<parameter=", "<invoke ")


def reads(sources: Iterable[str]) -> frozenset[str]:
    """Those of the variables tools, reasoning_effort and enable_thinking that a template looks at."""
    return frozenset(
        name for name in _VARIABLES if any(re.search(rf"\b{name}\b", source) for source in sources)
    )


def tool_format(source: str) -> str | None:
    """How calls are written; None where it is in no way that we know."""
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


def reasoning_format(source: str) -> str | None:
    """What stands around thoughts; None where it is nothing that we know."""
    return next((name for name, tags in REASONING_TAGS.items() if tags.close in source), None)
