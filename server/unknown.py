"""Fields that a request has and its API does not: named, with the name that was perhaps meant.

Knows names; does not know what fields do. Without `--strict` such fields are taken and the reply's
`x-quire-warnings` names them; with it they are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache

from server.errors import ApiError, shorten
from server.schema.common import WireModel

MAX_WARNINGS = 8
HEADER = "x-quire-warnings"
# Longer than any field: not worth comparing.
_MAX_NAME_CHARS = 40
_ALIKE = 0.75
# What other servers call the same.
_OTHER_NAMES: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
    "num_return_sequences": "n",
    "random_seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "enable_thinking": "chat_template_kwargs",
    "thinking": "chat_template_kwargs",
}


@lru_cache(1024)
def nearest(name: str, known: tuple[str, ...]) -> str | None:
    """The field that was meant, if one is close enough."""
    if len(name) > _MAX_NAME_CHARS:
        return None
    other = _OTHER_NAMES.get(name)
    if other in known:
        return other
    plain = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(plain, known, 1, _ALIKE)), None)


def check(request: WireModel, *, strict: bool) -> dict[str, str]:
    """The header that warns of unknown fields, and of those whose wish is not granted.

    Raises:
        ApiError: 400, `strict` and there is an unknown field.
    """
    known = tuple(type(request).model_fields)
    unknown = request.unknown_fields
    if strict and unknown:
        name = shorten(unknown[0])
        message = f"{name}: unknown field{_hint(unknown[0], known)}."
        raise ApiError(400, message, param=name, code="unknown_parameter")
    return warnings([*unknown, *request.ungranted_fields], known)


def warnings(names: Sequence[str], known: tuple[str, ...] = ()) -> dict[str, str]:
    """A header that names fields which were taken and ignored."""
    if not names:
        return {}
    shown = [
        shorten(name, 40).replace(",", " ") + (_hint(name, known) if name not in known else "")
        for name in names[:MAX_WARNINGS]
    ]
    more = len(names) - len(shown)
    return {HEADER: "ignored fields: " + ", ".join(shown) + (f" and {more} more" if more else "")}


def _hint(name: str, known: tuple[str, ...]) -> str:
    meant = nearest(name, known)
    return "" if meant is None else f" (did you mean {meant}?)"
