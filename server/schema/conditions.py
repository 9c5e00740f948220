"""Words of JSON Schema for fields that depend on each other, as validators check them.

Knows nothing but the words. A condition stands beside `properties` in a model's description, by way of
`json_schema_extra`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Words = dict[str, Any]

GIVEN: Words = {"not": {"type": "null"}}
NOTHING: Words = {"type": "null"}
NO_ITEMS: Words = {"type": ["array", "null"], "maxItems": 0}


def case(fields: Mapping[str, Words], required: Sequence[str] = ()) -> Words:
    """These fields, where they are there, are like this."""
    return {"properties": dict(fields), "required": list(required)}


def by_type(needs: Mapping[str, Sequence[str]], default: str = "") -> Words:
    """Each type has fields that it needs. `default`: the type where none is named."""
    cases = [
        case(
            {"type": {"const": kind}, **dict.fromkeys(names, GIVEN)},
            [*names] if kind == default else ["type", *names],
        )
        for kind, names in needs.items()
    ]
    return {"anyOf": cases}


def one_of(fields: Mapping[str, Words], nothing: Mapping[str, Words] | None = None) -> Words:
    """Exactly one of the fields is there.

    Args:
        fields: what each is where it is the one.
        nothing: what a field may be where it is not; left out: null.
    """
    absent = {**dict.fromkeys(fields, NOTHING), **(nothing or {})}
    return {"anyOf": [case({**absent, name: words}, [name]) for name, words in fields.items()]}
