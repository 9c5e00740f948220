"""What generated text must be: a small value that travels from a request to the engine.

Standard library only. It knows kinds, sources and sizes; what a source means is found out where it is
compiled (engine.sample.grammar), and what the engine does with it is written here as protocols.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest

MAX_CHOICES = 1024
MAX_SCHEMA_VALUES = 10_000
MAX_SCHEMA_DEPTH = 64
# What a compiler takes grows with the square of some of these.
MAX_PROPERTIES = 1000


@unique
class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"  # any object; the text is empty
    REGEX = "regex"  # the whole output matches
    CHOICE = "choice"  # a JSON list of strings
    LARK = "lark"
    STRUCTURAL_TAG = "structural_tag"  # {"structures": [...], "triggers": [...]}, see structural_tag


MAX_CHARS = {
    GrammarKind.JSON_SCHEMA: 1 << 18,
    GrammarKind.JSON_OBJECT: 0,
    GrammarKind.REGEX: 1 << 15,
    GrammarKind.CHOICE: 1 << 16,
    GrammarKind.LARK: 1 << 15,
    GrammarKind.STRUCTURAL_TAG: 1 << 17,
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A kind and a source. Sizes are checked once, here.

    Raises:
        InvalidRequest: it is too large, or its JSON is none.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        most = MAX_CHARS[self.kind]
        if len(self.text) > most:
            raise _invalid(f"The {self.kind} has {len(self.text)} characters; at most {most}.")
        if self.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.STRUCTURAL_TAG):
            _check_size(self.kind, _parsed(self.kind, self.text))
        elif self.kind is GrammarKind.CHOICE:
            _check_choices(_parsed(self.kind, self.text))
        elif not self.text and self.kind is not GrammarKind.JSON_OBJECT:
            raise _invalid(f"The {self.kind} is empty.")


JSON_OBJECT = Grammar(GrammarKind.JSON_OBJECT)


def json_schema(schema: Mapping[str, Any] | bool) -> Grammar:
    """JSON that is valid by the schema."""
    _check_size(GrammarKind.JSON_SCHEMA, schema)
    return Grammar(GrammarKind.JSON_SCHEMA, _dumped(schema))


def regex(pattern: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, pattern)


def choice(texts: Sequence[str]) -> Grammar:
    """One of these texts."""
    _check_choices(texts)
    return Grammar(GrammarKind.CHOICE, _dumped(list(texts)))


def lark(source: str) -> Grammar:
    """A context-free grammar in Lark's notation; it begins at the rule `start`."""
    return Grammar(GrammarKind.LARK, source)


def structural_tag(tag: Mapping[str, Any]) -> Grammar:
    """Free text in which what follows a trigger is one of the structures: begin, JSON by a schema, end."""
    _check_size(GrammarKind.STRUCTURAL_TAG, tag)
    return Grammar(GrammarKind.STRUCTURAL_TAG, _dumped(tag))


def forced_structures(
    structures: Sequence[Mapping[str, Any]],
    *,
    several: bool = False,
    first: str = "",
    between: str = "",
    last: str = "",
    thoughts: tuple[str, str] | None = None,
    instead: object = None,
) -> Grammar:
    """One of the structures and nothing else, or several in a row: {"begin", "schema", "end"} each.

    For calls of tools that a model must make: begin and end are the notation's, the schema is that of the
    arguments. With "values": "python" they are written as Python does, a=1, b="x", instead of in JSON.
    Control tokens written in begin, end and the like are those tokens.

    Args:
        first, between, last: what stands before, between and after the structures.
        thoughts: what opens and closes free text that may come before all else; it must come if what opens
            it is empty, which says that it has begun.
        instead: a schema of JSON that may be the whole text, but for the thoughts.
    """
    tag = {
        "structures": [dict(structure) for structure in structures],
        "forced": "some" if several else "one",
        **{name: text for name, text in (("first", first), ("between", between), ("last", last)) if text},
        **({"thoughts": list(thoughts)} if thoughts is not None else {}),
        **({"instead": instead} if instead is not None else {}),
    }
    return structural_tag(tag)


def schema_of(wanted: Grammar) -> Any:
    """The JSON Schema that a grammar is made of; None where it is of another kind.

    Raises:
        InvalidRequest: it was given as text, and is no schema.
    """
    if wanted.kind is GrammarKind.JSON_OBJECT:
        return {"type": "object"}
    if wanted.kind is not GrammarKind.JSON_SCHEMA:
        return None
    schema = json.loads(wanted.text)
    if not isinstance(schema, dict | bool):
        raise _invalid("The schema must be an object.")
    return schema


class Matcher(Protocol):
    """One choice's place in its grammar. Only the tokens it was shown move it."""

    @property
    def num_words(self) -> int:
        """Of a mask."""
        ...

    @property
    def ended(self) -> bool:
        """The grammar is complete, and nothing may follow."""
        ...

    def take(self, token_id: int) -> None:
        """The choice goes on with a token. What is wrong with it, `fill` says."""
        ...


class Grammars(Protocol):
    """Compiles grammars and keeps them. May be asked from several threads; the one that steps may `fill`."""

    def fill(self, matchers: Sequence[Matcher], words_KW: NDArray[np.uint32]) -> list[str | None]:
        """Has matchers write which tokens may follow: row k for matcher k, bit t % 32 of word t // 32 for
        token t. Says for each why no token can follow."""
        ...

    def ready(self, grammar: Grammar) -> bool:
        """Whether `start` returns at once."""
        ...

    def start(self, grammar: Grammar) -> Matcher:
        """A new choice's place at the grammar's beginning; compiles where that was not done before.

        Raises:
            InvalidRequest: it cannot be compiled, or nothing could ever be generated.
        """
        ...


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, "grammar")


def _dumped(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise _invalid("The grammar is nested too deeply.") from None
    except (TypeError, ValueError):
        raise _invalid("The grammar is not JSON.") from None


def _parsed(kind: GrammarKind, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise _invalid(f"The {kind} is nested too deeply.") from None
    except ValueError:
        raise _invalid(f"The {kind} is not JSON.") from None


def _check_size(kind: GrammarKind, value: Any) -> None:
    """Counts values level by level, so that no depth can harm, and no further than is needed."""
    level, depth, count, chars = [value], 0, 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        chars += sum(len(inner) for inner in level if isinstance(inner, str))
        if depth > MAX_SCHEMA_DEPTH:
            raise _invalid(f"The {kind} is nested more than {MAX_SCHEMA_DEPTH} levels deep.")
        if count > MAX_SCHEMA_VALUES:
            raise _invalid(f"The {kind} holds more than {MAX_SCHEMA_VALUES} values.")
        if chars > MAX_CHARS[kind]:
            raise _invalid(f"The {kind} holds more than {MAX_CHARS[kind]} characters.")
        if any(isinstance(inner, dict) and len(inner) > MAX_PROPERTIES for inner in level):
            raise _invalid(f"The {kind} has an object of more than {MAX_PROPERTIES} properties.")
        level = [inner for outer in level for inner in _inside(outer)]


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_choices(texts: Any) -> None:
    if not isinstance(texts, list | tuple) or not 1 <= len(texts) <= MAX_CHOICES:
        raise _invalid(f"choice must be a list of 1 to {MAX_CHOICES} strings.")
    if not all(isinstance(text, str) and text for text in texts):
        raise _invalid("Each choice must be a string that is not empty.")
