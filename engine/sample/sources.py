"""Grammars of all kinds as one of the notations that llguidance reads, which is not imported here.

Knows what a request may say and what llguidance would make of it; not tokens. What cannot be said is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.grammar import Grammar, GrammarKind
from engine.sample.python_values import SHARED, PythonRules
from engine.sample.refusals import refused

# Between the values of JSON: nothing, a space, or a line break with as much indentation as anybody needs.
# Without a bound a model can go on with white space for ever.
WHITESPACE = r"[ ]|\n[ \t]{0,32}"


class Source(NamedTuple):
    """What llguidance compiles: its notation is "json" (a schema), "regex" or "lark"."""

    notation: str
    text: str


def source(grammar: Grammar, control: Mapping[str, int]) -> Source:
    """A grammar in a notation of llguidance's.

    Args:
        control: the model's control tokens, which a structural tag may name.

    Raises:
        InvalidRequest: it says what cannot be enforced.
    """
    kind, text = grammar.kind, grammar.text
    if kind is GrammarKind.JSON_OBJECT:
        text = '{"type":"object"}'
    if kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT):
        return Source("json", _json_schema(text))
    if kind is GrammarKind.REGEX:
        return Source("regex", ascii_classes(text))
    if kind is GrammarKind.CHOICE:
        return Source("regex", "|".join(re.escape(choice) for choice in json.loads(text)))
    if kind is GrammarKind.LARK:
        if "::=" in text:
            raise refused("it is written in EBNF; write it in Lark's notation (start: ...)")
        return Source("lark", text)
    return Source("lark", tag_source(json.loads(text), control))


def _json_schema(schema: str) -> str:
    portable = ascii_patterns(json.loads(schema))
    if isinstance(portable, dict):
        portable.pop("x-guidance", None)  # the compiler's own options
    return json.dumps(portable)


def ascii_classes(pattern: str) -> str:
    r"""Has `\d` and `\w` mean ASCII, as JSON Schema says and as whoever reads the number expects.

    >>> ascii_classes(r"\d+[\d.]\\d")
    '[0-9]+[0-9.]\\\\d'
    """
    out, inside = [], False
    for piece in re.findall(r"\\.|[^\\]|\\$", pattern, re.DOTALL):
        if piece in _ASCII:
            piece = _ASCII[piece] if inside else f"[{_ASCII[piece]}]"
        elif piece in _NOT_ASCII and not inside:
            piece = f"[^{_NOT_ASCII[piece]}]"
        elif piece in "[]":
            inside = piece == "["
        out.append(piece)
    return "".join(out)


_ASCII = {r"\d": "0-9", r"\w": "0-9A-Za-z_"}
_NOT_ASCII = {r"\D": "0-9", r"\W": "0-9A-Za-z_"}
_VALUES = ("enum", "const", "default", "examples", "example")


def ascii_patterns(schema: Any) -> Any:
    """The schema with its patterns rewritten; values in it are left as they are."""
    if isinstance(schema, list):
        return [ascii_patterns(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, inner in schema.items():
        if name == "pattern" and isinstance(inner, str):
            found[name] = ascii_classes(inner)
        elif name == "patternProperties" and isinstance(inner, dict):
            found[name] = {ascii_classes(key): ascii_patterns(value) for key, value in inner.items()}
        else:
            found[name] = inner if name in _VALUES else ascii_patterns(inner)
    return found


def tag_source(tag: Any, control: Mapping[str, int]) -> str:
    """Lark for {"structures": [{"begin", "schema", "end"}], "triggers": [...]}.

    With "values": "python" a structure has no JSON but the arguments of a call in Python's notation.

    Text is free up to a trigger. From there on it is one of the structures whose begin has that trigger in
    front. A trigger that is one of the model's control tokens is that token. With "forced" ("one" or "some")
    there are no triggers and no free text: one structure, or several in a row, with "first", "between" and
    "last" around them, or, "instead" of all that, JSON by a schema. Before it there may be "thoughts", which
    are free: what opens and what closes them.
    """
    structures, triggers, forced = _tag_parts(tag)
    rules = []
    for i, structure in enumerate(structures):
        begin = structure["begin"]
        trigger = "" if forced else next((t for t in triggers if begin.startswith(t)), None)
        if trigger is None:
            raise refused(f"structure {i} begins with none of the triggers")
        head = ""
        if trigger in control:
            head = f"TEXT <[{control[trigger]}]>"
        elif trigger:
            head = f"head_{i}"
            rules.append(f"head_{i}[lazy]: TEXT {json.dumps(trigger)}")
        begin, end = _quoted(begin[len(trigger) :], control), _quoted(structure["end"], control)
        body = _embedded(structure["schema"])
        if structure.get("values") == "python":
            python = PythonRules(f"tag_{i}_", ascii_patterns(structure["schema"]))
            body = python.arguments()
            rules += python.rules
        rules.append(f"tag_{i}: {head} {begin} {body} {end}")
    if any(structure.get("values") == "python" for structure in structures):
        rules += SHARED
    either = " | ".join(f"tag_{i}" for i in range(len(structures)))
    if not forced:
        return "\n".join(["%llguidance {}", f"start: ({either})* rest", "rest: TEXT", _TEXT, *rules])
    first, between, last = (_quoted(tag.get(name, ""), control) for name in _AROUND)
    more = f"({between} ({either}))*" if forced == "some" else ""
    thoughts, of_thoughts = _thoughts(tag.get("thoughts"), control)
    if "instead" in tag:
        rules.append(f"instead: {_embedded(tag['instead'])}")
    instead = "| instead" if "instead" in tag else ""
    start = f"start: {thoughts} ({first} ({either}) {more} {last} {instead})"
    return "\n".join(["%llguidance {}", start, *of_thoughts, *rules])


_TEXT = r"TEXT: /(.|\n)*/"
_AROUND = ("first", "between", "last")


def _thoughts(tags: Any, control: Mapping[str, int]) -> tuple[str, list[str]]:
    """Free text up to a tag, and what of it the beginning refers to."""
    if tags is None:
        return "", []
    opening, close = tags
    if close in control:
        until = f"thoughts: TEXT <[{control[close]}]>"
    else:
        until = f"thoughts[lazy]: TEXT {json.dumps(close)}"
    rules = [until, _TEXT, r"GAP: /[ \n]{1,4}/"]
    return f"({_quoted(opening, control)} thoughts GAP?){'?' if opening else ''}", rules


def _embedded(schema: Any) -> str:
    portable = ascii_patterns(schema)
    if isinstance(portable, dict):
        portable = {**portable, "x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps(portable)}"


def _tag_parts(tag: Any) -> tuple[list[Any], list[str], str | None]:
    tag = tag if isinstance(tag, dict) else {}
    structures, triggers, forced = (tag.get(name) for name in ("structures", "triggers", "forced"))
    if forced in ("one", "some"):
        triggers = []
    elif not isinstance(triggers, list) or not triggers:
        raise refused("a structural tag needs lists of structures and triggers")
    if not isinstance(structures, list) or not structures:
        raise refused("a structural tag needs lists of structures and triggers")
    if not all(isinstance(trigger, str) and trigger for trigger in triggers):
        raise refused("each trigger must be a string that is not empty")
    if not all(isinstance(tag.get(name, ""), str) for name in _AROUND):
        raise refused("what stands around the structures must be strings")
    if not isinstance(tag.get("instead", True), dict | bool):
        raise refused("what may stand instead of the structures is a schema")
    thoughts = tag.get("thoughts", ["", "."])
    if not isinstance(thoughts, list) or [type(text) for text in thoughts] != [str, str] or not thoughts[1]:
        raise refused("thoughts are what opens and what closes them")
    for structure in structures:
        if not isinstance(structure, dict) or not isinstance(structure.get("schema"), dict | bool):
            raise refused("each structure needs a schema")
        if structure.get("values", "json") not in ("json", "python"):
            raise refused("values are written in json or python")
        if not isinstance(structure.get("begin"), str) or not isinstance(structure.get("end"), str):
            raise refused("each structure needs a begin and an end")
    return structures, triggers, forced if forced in ("one", "some") else None


def _quoted(text: str, control: Mapping[str, int]) -> str:
    """Text for a Lark rule, with control tokens as tokens."""
    if not text:
        return ""
    if not control:
        return json.dumps(text)
    pattern = "|".join(re.escape(name) for name in sorted(control, key=len, reverse=True))
    pieces = [piece for piece in re.split(f"({pattern})", text) if piece]
    return " ".join(f"<[{control[piece]}]>" if piece in control else json.dumps(piece) for piece in pieces)
