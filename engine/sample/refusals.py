"""What is wrong with a grammar, in words for whoever sent it. Knows the complaints of llguidance only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from engine.errors import InvalidRequest

_UNSUPPORTED = re.compile(r"Unimplemented keys: \[(.*)\]")
_REMOTE = re.compile(r"Resource '(.*)' is not present")


def refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The grammar cannot be compiled: {reason}.", "grammar")


def unsupported(keywords: Iterable[str], where: str = "") -> InvalidRequest:
    names = ", ".join(map(json.dumps, keywords))
    return refused(f"the schema has keywords that are not supported{where}: {names}")


def reason(error: str) -> str:
    """llguidance's complaint as part of a sentence: its first line, without what is ours alone."""
    if "panic" in error:
        return "it is too large"
    if found := _UNSUPPORTED.search(error):
        return f"the schema has keywords that are not supported: {found[1]}"
    if found := _REMOTE.search(error):
        return f"$ref leaves the schema ({found[1][:80]}), and nothing is fetched"
    if "recursion limit" in error:
        return "it is nested too deeply"
    first, *others = error.removesuffix("<non-verbose/>").strip().splitlines() or [""]
    detail = next((line for line in others if line.startswith("error: ")), "").removeprefix("error: ")
    return " ".join(filter(None, (first.strip(), detail)))[:300].rstrip(".:") or "it is not valid"
