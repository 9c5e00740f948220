"""Random JSON Schemas that a random model can satisfy within a few hundred bytes, and short regexes."""

from __future__ import annotations

import random
from typing import Any

NAMES = ("id", "name", "tags", "größe", "a b", 'q"x', "nested", "value_1")
WORDS = ("red", "green", "", "déjà vu", 'say "hi"', "back\\slash", "line\nbreak", "日本")
PATTERNS = ("^[a-z]{2,5}$", "^\\d{3}-\\d{4}$", "^(cat|dog)s?$", "^[A-Z][a-z]*\\.$")
FORMATS = ("date", "uuid", "ipv4", "email")
REGEXES = (
    "[ab]{3}c?",
    "(foo|bar|ba+z)\\.",
    "\\d{4}-\\d{2}-\\d{2}",
    "x*y",
    '[^\\n"]{0,5}!',
    "(é|日本){1,2}",
    "\\w{2,4}",
)


def random_schema(seed: int) -> dict[str, Any]:
    """An object or an array at the top, with everything that people use below it."""
    return _Maker(random.Random(seed)).root()


class _Maker:
    def __init__(self, choose: random.Random) -> None:
        self._choose = choose
        self._defs: dict[str, Any] = {}

    def root(self) -> dict[str, Any]:
        schema = self._choose.choice((self._object, self._object, self._array))(3)
        return {**schema, "$defs": self._defs} if self._defs else schema

    def _any(self, depth: int) -> dict[str, Any]:
        leaves = (self._integer, self._number, self._string, self._enum, self._const, self._simple)
        inner = (self._object, self._array, self._any_of, self._ref, self._nullable)
        makers = leaves if depth <= 0 else (*leaves, *inner, *inner)
        schema: dict[str, Any] = self._choose.choice(makers)(depth - 1)
        return schema

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._choose.sample(NAMES, self._choose.randint(0, 4))
        required = [name for name in names if self._choose.random() < 0.7]
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": required,
            "additionalProperties": False,
        }
        if self._choose.random() < 0.1:
            schema["title"], schema["description"] = "A title", "What it is for."
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._choose.randint(0, 2)
        schema = {"type": "array", "minItems": least, "maxItems": least + self._choose.randint(0, 2)}
        if self._choose.random() < 0.2:
            return {**schema, "minItems": 2, "maxItems": 2, "items": False} | {
                "prefixItems": [self._any(depth), self._any(depth)]
            }
        return {**schema, "items": self._any(depth)}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth) for _ in range(self._choose.randint(2, 3))]}

    def _nullable(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth), {"type": "null"}]}

    def _ref(self, depth: int) -> dict[str, Any]:
        name = f"shared{len(self._defs)}"
        self._defs[name] = True  # its place, while what is in it is made
        self._defs[name] = self._any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _integer(self, depth: int) -> dict[str, Any]:
        low = self._choose.randint(-1000, 1000)
        schema: dict[str, Any] = {
            "type": "integer",
            "minimum": low,
            "maximum": low + self._choose.randint(0, 500),
        }
        if self._choose.random() < 0.2:
            schema = {"type": "integer", "exclusiveMinimum": 0, "maximum": 99, "multipleOf": 3}
        return schema

    def _number(self, depth: int) -> dict[str, Any]:
        low = round(self._choose.uniform(-50, 50), 1)
        return {"type": "number", "minimum": low, "maximum": low + self._choose.randint(1, 9)}

    def _string(self, depth: int) -> dict[str, Any]:
        kind = self._choose.random()
        if kind < 0.3:
            return {"type": "string", "pattern": self._choose.choice(PATTERNS)}
        if kind < 0.4:
            return {"type": "string", "format": self._choose.choice(FORMATS)}
        least = self._choose.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self._choose.randint(0, 6)}

    def _enum(self, depth: int) -> dict[str, Any]:
        values: tuple[Any, ...] = (*WORDS, 1, -2.5, True, None, [1, "x"], {"k": []})
        return {"enum": self._choose.sample(values, self._choose.randint(1, 4))}

    def _const(self, depth: int) -> dict[str, Any]:
        return {"const": self._choose.choice(WORDS)}

    def _simple(self, depth: int) -> dict[str, Any]:
        return {"type": self._choose.choice(("boolean", "null", "integer"))}
