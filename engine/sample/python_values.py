"""Values in Python's notation by a JSON Schema, as rules of Lark: for calls written f(a=1, b="x").

    {"properties": {"a": {"type": "integer"}}, "required": ["a"]}   ->   "a=" INTEGER

What is written so is JSON but for True, False and None, so strings, numbers and their limits are left to
llguidance's own `%json`. There is one way to write a value: `, ` and `: ` between, double quotes. What the
rules allow is always valid by the schema, though not all that is valid can be written. Keywords that say more
than the rules can are refused. Knows schemas and Lark; not tools, and no whole grammars.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from engine.sample.refusals import refused, unsupported

# Of values about which the schema says nothing; the depth keeps a model from opening lists for ever.
ANY_DEPTH = 6
SHARED = [
    r'PYTHON_STRING: /"([^"\\\x00-\x1f]|\\["\\nrtbf])*"/',
    r"PYTHON_NAME: /[A-Za-z_][A-Za-z0-9_]{0,63}/",
    r"PYTHON_INTEGER: /-?(0|[1-9][0-9]{0,30})/",
    r"PYTHON_NUMBER: /-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,2})?/",
    'python_0: PYTHON_STRING | PYTHON_NUMBER | "True" | "False" | "None"',
    *(
        f'python_{i}: python_0 | "[" (python_{i - 1} (", " python_{i - 1})*)? "]"'
        f' | "{{" (python_pair_{i} (", " python_pair_{i})*)? "}}"\n'
        f'python_pair_{i}: PYTHON_STRING ": " python_{i - 1}'
        for i in range(1, ANY_DEPTH + 1)
    ),
]
_ANY = f"python_{ANY_DEPTH}"

_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly")
) | {"$schema", "$id", "$comment", "$defs", "definitions"}
_SCALARS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_SCALARS["integer"] = _SCALARS["number"]
_KEYWORDS = {
    **_SCALARS,
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
    "boolean": (),
    "null": (),
}
_ONLY = ("$ref", "anyOf", "allOf", "enum", "const")  # these say all there is to say
_KNOWN = {"type", *_ONLY, *(word for words in _KEYWORDS.values() for word in words)}
_PARAMETER = re.compile(r"[A-Za-z0-9_]{1,256}")
# Escapes that mean the same in both notations: Python keeps the backslash of `\/`, and has no surrogates.
_ESCAPES = {"x-guidance": {"json_allowed_escapes": '"\\bfnrt'}}


class PythonRules:
    """The rules of one schema.

    Args:
        prefix: of their names, to tell them from others in the grammar.
        root: what `$ref` refers to.

    Attributes:
        rules: Lark, to be used with those `SHARED` by all.
    """

    def __init__(self, prefix: str, root: Any) -> None:
        self.rules: list[str] = []
        self._prefix = prefix
        self._root = root
        self._names: dict[str, str] = {}

    def arguments(self) -> str:
        """The rule of the root's properties as arguments of a call.

        Raises:
            InvalidRequest: the schema says what these rules cannot.
        """
        schema = self._root
        if "$ref" in schema:
            _alone("$ref", {**schema, "type": None})
            schema = self._target(schema["$ref"])
        if not isinstance(schema, dict) or any(word in schema for word in _ONLY):
            raise refused("in this notation arguments need a schema with properties")
        _check(schema)
        return self._members(schema, called=True)

    def _value(self, schema: Any) -> str:
        """The rule of a value. It has its name before it is made: it may refer to itself."""
        key = json.dumps(schema)
        if key not in self._names:
            name = self._names[key] = f"{self._prefix}value{len(self._names)}"
            self.rules.append(f"{name}: {' | '.join(self._ways(schema))}")
        return self._names[key]

    def _ways(self, schema: Any) -> Iterable[str]:
        if schema is True or (isinstance(schema, dict) and not schema.keys() - _ANNOTATIONS):
            return [_ANY]
        if not isinstance(schema, dict):
            raise refused("a schema in it allows nothing" if schema is False else "a schema in it is none")
        _check(schema)
        if "$ref" in schema:
            _alone("$ref", schema)
            return [self._value(self._target(schema["$ref"]))]
        for word in ("anyOf", "allOf"):
            if word in schema:
                _alone(word, schema)
                return map(self._value, _alternatives(word, schema[word]))
        types = _types(schema)
        if "enum" in schema or "const" in schema:
            return _literals(schema, types)
        return [self._typed(kind, schema) for kind in types]

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "boolean":
            return '"True" | "False"'
        if kind == "null":
            return '"None"'
        if kind == "array":
            return f'"[" {self._items(schema)} "]"'
        if kind == "object":
            return f'"{{" {self._members(schema, called=False)} "}}"'
        said = {word: schema[word] for word in _SCALARS[kind] if word in schema}
        if not said:
            return f"PYTHON_{kind.upper()}"
        return self._rule(f"%json {json.dumps({'type': kind, **said, **_ESCAPES})}")

    def _items(self, schema: Mapping[str, Any]) -> str:
        """What stands in a list. From its end on: item i may be the last if `least` are written before it."""
        first, rest = _get(schema, "prefixItems", list, []), schema.get("items", True)
        least, most = _get(schema, "minItems", int, 0), _get(schema, "maxItems", int, None)
        if not first and rest is not False:
            first = [rest]
        if rest is False:
            most = min(len(first), len(first) if most is None else most)
        if most is not None and least > most:
            raise refused("a list in it can have no length")
        first = first[:most]
        tail = ""
        if most is None or most > len(first):
            bound = "" if most is None else most - len(first)
            tail = f'(", " {self._value(rest)}){{{max(0, least - len(first))},{bound}}}'
        for i in reversed(range(len(first))):
            item = '", " ' * (i > 0) + f"{self._value(first[i])} {tail}"
            tail = self._rule(item if i < least else f"({item})?")
        return tail

    def _members(self, schema: Mapping[str, Any], *, called: bool) -> str:
        """What stands in a dictionary or, with `called`, between the brackets of a call.

        From its end on, two rules for each property: with nothing written before it, and with something.
        """
        properties, required = _get(schema, "properties", dict, {}), _get(schema, "required", list, [])
        stated = schema.get("additionalProperties", True)
        wanted = {**properties, **{name: stated for name in required if name not in properties}}
        # A schema that names properties and says nothing of others wants those: a model is not led astray.
        more = stated if "additionalProperties" in schema or not wanted else False
        bare, after = self._others(more, wanted, called=called)
        for name, inner in reversed(wanted.items()):
            if inner is False and name not in required:
                continue
            pair = f"{_key(name, called=called)} {self._value(inner)}"
            bare = self._rule(f"{pair} {after}" + f" | {bare}" * (name not in required))
            after = self._rule(f'", " {pair} {after}' + f" | {after}" * (name not in required))
        return bare

    def _others(self, schema: Any, named: Iterable[str], *, called: bool) -> tuple[str, str]:
        """Properties that have no name in the schema: after nothing, and after something."""
        if schema is False:
            return '""', '""'
        key, between = ("PYTHON_NAME", "=") if called else ("PYTHON_STRING", ": ")
        taken = [json.dumps(name if called else _text(name)) for name in named]
        if taken:
            other = f"{self._prefix.upper()}OTHER{len(self.rules)}"
            self.rules.append(f"{other}: {key} & ~({' | '.join(taken)})")
            key = other
        pair = f"{key} {json.dumps(between)} {self._value(schema)}"
        after = self._rule(f'(", " {pair})*')
        return self._rule(f"({pair} {after})?"), after

    def _rule(self, body: str) -> str:
        name = f"{self._prefix}part{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _target(self, pointer: Any) -> Any:
        found = self._root
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise refused(f"$ref leaves the schema ({str(pointer)[:80]}), and nothing is fetched")
        for part in pointer[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                raise refused(f"$ref to {pointer[:80]}, which does not exist")
            found = found[name]
        return found


def _check(schema: Mapping[str, Any]) -> None:
    """Raises where a keyword says what no rule does."""
    strange = [word for word in schema if word not in _KNOWN | _ANNOTATIONS and not word.startswith("x-")]
    if strange:
        raise unsupported(strange)


def _alone(word: str, schema: Mapping[str, Any]) -> None:
    """Raises where other keywords narrow what this one says."""
    others = [other for other in schema if other != word and other in _KNOWN and schema[other] is not None]
    if others:
        raise unsupported(others, f" beside {word}")


def _alternatives(word: str, schemas: Any) -> list[Any]:
    if not isinstance(schemas, list) or not schemas:
        raise refused(f"{word} must be a list of schemas")
    if word == "allOf" and len(schemas) > 1:
        raise unsupported([word])
    return schemas


def _types(schema: Mapping[str, Any]) -> list[str]:
    """As it says; else those that it says something about."""
    said = schema.get("type")
    if said is None:
        implied = [kind for kind, words in _KEYWORDS.items() if any(word in schema for word in words)]
        return implied or list(_KEYWORDS)
    types = said if isinstance(said, list) else [said]
    for kind in types:
        if kind not in _KEYWORDS:
            raise refused(f"Invalid type: {kind}")
    if not types:
        raise refused("a schema in it allows nothing")
    return types


def _literals(schema: Mapping[str, Any], types: Iterable[str]) -> list[str]:
    """The values of enum or const that have one of the types."""
    word = "enum" if "enum" in schema else "const"
    _alone(word, {**schema, "type": None})
    values = _get(schema, "enum", list, None) if word == "enum" else [schema["const"]]
    fitting = [value for value in values if any(_is_a(kind, value) for kind in types)]
    if not fitting:
        raise refused("a schema in it allows nothing")
    return [json.dumps(_text(value)) for value in fitting]


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "array": list,
    "object": dict,
    "boolean": bool,
    "null": type(None),
}


def _is_a(kind: str, value: Any) -> bool:
    return isinstance(value, _KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _text(value: Any) -> str:
    """A value of JSON in Python's notation, as the rules would write it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(inner)}" for key, inner in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _key(name: str, *, called: bool) -> str:
    if not called:
        return json.dumps(_text(name) + ": ")
    if not _PARAMETER.fullmatch(name):
        raise refused(f"in this notation no argument can be called {name[:80]!r}")
    return json.dumps(name + "=")


def _get(schema: Mapping[str, Any], word: str, kind: type, default: Any) -> Any:
    value = schema.get(word, default)
    if word in schema and (not isinstance(value, kind) or isinstance(value, bool)):
        raise refused(f"the value of {word} is not what JSON Schema wants")
    return value
