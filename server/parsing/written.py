"""How a call is written in each notation, for grammars that hold a model to it.

What is written so, the notation's parser reads. Knows notations only, not tools or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Written:
    """One notation.

    Attributes:
        begin, end: what stands before and after a call's arguments; `%s` in begin is the tool's name.
        first, between, last: before all calls, between two and after all.
        marker: what says, in free text, that a call follows; empty: nothing does.
        values: the notation of the arguments, json or python.
    """

    begin: str
    end: str = ""
    first: str = ""
    between: str = ""
    last: str = ""
    marker: str = ""
    values: str = "json"


HERMES = Written(
    '<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>", between="\n", marker="<tool_call>"
)
LLAMA3_JSON = Written('{"name": "%s", "parameters": ', "}", between="; ")
PYTHONIC = Written("%s(", ")", first="[", between=", ", last="]", values="python")
MISTRAL = Written("[TOOL_CALLS]%s[ARGS]", marker="[TOOL_CALLS]")


def mistral_list(space: str) -> Written:
    """Some of Mistral's tokenizers write a space after the token."""
    first = f"[TOOL_CALLS]{space}["
    return Written(
        '{"name": "%s", "arguments": ', "}", first=first, between=", ", last="]", marker="[TOOL_CALLS]"
    )


def written(notation: str | None, templates: Sequence[str]) -> Written | None:
    """How a model with these templates writes calls; None where it writes none."""
    if notation == "mistral":
        if any("[ARGS]" in source for source in templates):
            return MISTRAL
        return mistral_list(" " if any("[TOOL_CALLS] [" in source for source in templates) else "")
    return {"hermes": HERMES, "llama3_json": LLAMA3_JSON, "pythonic": PYTHONIC}.get(notation or "")
