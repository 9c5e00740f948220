"""Jinja as chat templates expect it, in a sandbox that also bounds what a render may cost.

A template comes with a checkpoint: it is data, and must neither reach Python nor exhaust memory or time.
Knows Jinja; does not know messages or tokens.

Bounded: the size of what is rendered and of values that are repeated, padded, formatted, powered, replaced,
joined or read from a namespace; all ranges together; and the time, looked at whenever the template touches an
attribute, an item or a function. Not bounded: a loop that touches none of these, over a long value it was
given, and a long chain of `~` written out by hand.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED_CHARS = 16 << 20
MAX_RANGE_ITEMS = 1 << 20
_MAX_POWER_BITS = 4096
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format"})
_WIDE_FORMAT = re.compile(r"\d{5,}|%[^a-zA-Z%]*\*")
_TICKS_PER_LOOK = 64


class RenderLimit(jinja2.TemplateError):
    """The template asked for more than a prompt can need."""


class _Spent(threading.local):
    """What the render on this thread has used."""

    deadline_s = 0.0
    ticks = 0
    range_items = 0


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The dialect of chat templates: loop controls, `generation` blocks, and a few functions."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        self._spent = _Spent()
        self.filters["tojson"] = _tojson
        self.filters["center"] = self._center
        self.filters["indent"] = self._indent
        self.filters["format"] = _format
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now, "range": self._range}

    def run(self, template: jinja2.Template, variables: Mapping[str, Any], time_limit_s: float) -> str:
        """Renders within the limits.

        Raises:
            jinja2.TemplateError: RenderLimit among them.
        """
        self._spent.deadline_s = time.monotonic() + time_limit_s
        self._spent.ticks = self._spent.range_items = 0
        pieces, size = [], 0
        for piece in template.generate(variables):
            size += len(piece)
            _limit(size)
            self._look_at_the_clock()
            pieces.append(piece)
        return "".join(pieces)

    def _tick(self) -> None:
        spent = self._spent
        spent.ticks += 1
        if spent.ticks % _TICKS_PER_LOOK == 0:
            self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self._spent.deadline_s:
            raise RenderLimit("it takes too long")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._tick()
        return _limited(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._tick()
        return _limited(super().getitem(obj, argument))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Jinja names its own parameters so, that a template may pass any keyword.
        __self._tick()
        _limit_call(__obj, args, kwargs)
        return _limited(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._tick()
        if operator == "*":
            _limit_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _limit(left.bit_length() * max(right, 0), _MAX_POWER_BITS)
        elif operator == "%" and isinstance(left, str):
            return _format(left, *(right if isinstance(right, tuple) else (right,)))
        return _limited(super().call_binop(context, operator, left, right))

    def _range(self, *bounds: int) -> range:
        items = range(*bounds)
        self._spent.range_items += len(items)
        _limit(self._spent.range_items, MAX_RANGE_ITEMS)
        return items

    def _center(self, value: str, width: int = 80) -> str:
        _limit(width)
        return jinja2.filters.do_center(value, width)

    def _indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        size = width if isinstance(width, int) else len(width)
        _limit(size * (str(s).count("\n") + 1))
        return jinja2.filters.do_indent(s, width, first, blank)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares a set)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _limit(size: object, most: int = MAX_RENDERED_CHARS) -> None:
    if isinstance(size, int) and size > most:
        raise RenderLimit(f"it makes something larger than {most}")


def _limited(value: Any) -> Any:
    if isinstance(value, str):
        _limit(len(value))
    return value


def _limit_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Looks at string methods that can make much out of little, before they do."""
    function = getattr(function, "__wrapped__", function)  # Jinja wraps str.format
    owner = getattr(function, "__self__", None)
    if not isinstance(owner, str):
        return
    name = function.__name__
    if name in _PADDING_METHODS:
        for argument in (*args, *kwargs.values()):
            _limit(argument)
        if name == "format" and _WIDE_FORMAT.search(owner):
            raise RenderLimit("it formats to an unreasonable width")
    elif name == "replace" and len(args) >= 2:
        _limit(len(owner) + owner.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple | range):
        _limit(len(owner) * len(args[0]))


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    if _WIDE_FORMAT.search(str(value)):
        raise RenderLimit("it formats to an unreasonable width")
    return jinja2.filters.do_format(value, *args, **kwargs)


def _limit_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            _limit(len(value) * times)
    if isinstance(left, int) and isinstance(right, int):
        _limit(left.bit_length() + right.bit_length(), _MAX_POWER_BITS)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
