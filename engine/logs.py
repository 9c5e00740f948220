"""How log records become lines: text for people, JSON for programs.

Knows records and terminals; does not know what is logged. Both processes use it, so that their lines look
the same. Standard library only. Whatever a record carries, it stays on its line: control characters are
written as escapes, and the lines of a traceback are indented, so that nobody's input can pass for a line of
ours.

What a program may want to read goes in `extra={"fields": {...}}`: JSON has them as members of their own, text
leaves them to the message.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

# C0 and C1 controls, separators of lines and paragraphs, marks that turn the direction of what follows,
# surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_UNSAFE_IN_TRACE = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))
_MAX_MESSAGE_CHARS = 16_384
_MAX_TRACE_CHARS = 65_536

_RESET, _DIM, _RED, _YELLOW, _CYAN = "\x1b[0m", "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[36m"
_LEVELS = {10: "debug", 20: "info", 30: "warning", 40: "error", 50: "critical"}
_WORDS = {"critical": "FATAL"}
_COLOURS = {"debug": _DIM, "warning": _YELLOW, "error": _RED, "critical": _RED}
# Members that a record's own fields may not replace.
_OURS = frozenset({"time", "level", "logger", "message", "exception"})


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How to log. Sent to the engine process as it is.

    Attributes:
        form: "text" or "json".
        terminal: a person watches: the time of day is enough.
        colour: of text.
    """

    level: str = "info"
    form: str = "text"
    terminal: bool = False
    colour: bool = False


def plain(text: str) -> str:
    """The text without anything that could end its line or steer a terminal."""
    return _UNSAFE.sub(_escape, text) if _UNSAFE.search(text) else text


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    named = {9: "\\t", 10: "\\n", 13: "\\r"}.get(code)
    return named or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if len(message) > _MAX_MESSAGE_CHARS:
        message = f"{message[:_MAX_MESSAGE_CHARS]}... ({len(message)} characters)"
    return plain(message)


def _trace(record: logging.LogRecord) -> str:
    """The traceback, its end if it is too long."""
    parts = []
    if record.exc_info:
        parts.append(logging.Formatter().formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return _UNSAFE_IN_TRACE.sub(_escape, "\n".join(parts)[-_MAX_TRACE_CHARS:])


class TextFormatter(logging.Formatter):
    """`time LEVEL source message`, in columns."""

    def __init__(self, options: LogOptions) -> None:
        super().__init__()
        self._time_format = "%H:%M:%S" if options.terminal else "%Y-%m-%d %H:%M:%S"
        self._colour = options.colour

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelno, "info")
        when = f"{time.strftime(self._time_format, time.localtime(record.created))}.{int(record.msecs):03d}"
        word, source, message = (
            f"{_WORDS.get(level, level.upper()):<7}",
            f"{source_of(record.name):<7}",
            _message(record),
        )
        if self._colour:
            tint = _COLOURS.get(level, "")
            when, source = f"{_DIM}{when}{_RESET}", f"{_CYAN}{source}{_RESET}"
            word, message = (f"{tint}{part}{_RESET}" if tint else part for part in (word, message))
        line = f"{when} {word} {source} {message}"
        trace = _trace(record)
        return "\n    | ".join([line, *trace.split("\n")]) if trace else line


def source_of(logger: str) -> str:
    """ "quire" -> "server", "quire.access" -> "access", "engine.process.loop" -> "engine"."""
    first, _, rest = logger.partition(".")
    if first == "quire":
        return rest.partition(".")[0] or "server"
    return plain(first)


class JsonFormatter(logging.Formatter):
    """One object per line, ASCII: a stream of any encoding can take it."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": _LEVELS.get(record.levelno, "info"),
            "logger": record.name,
            "message": _message(record),
        }
        for name, value in getattr(record, "fields", {}).items():
            if name not in _OURS:
                line[name] = _value(value)
        trace = _trace(record)
        if trace:
            line["exception"] = trace
        return json.dumps(line, separators=(",", ":"), default=lambda value: plain(str(value)))


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(key)): _value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    return value


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that we replace no one else's."""


def configure(options: LogOptions, stream: TextIO | None = None) -> logging.Handler:
    """Sends every logger's records to the stream (stderr), our own from `options.level` on.

    Python's warnings and errors that nobody caught become records as well.
    """
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter() if options.form == "json" else TextFormatter(options))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    level = logging.getLevelNamesMapping()[options.level.upper()]
    root.setLevel(max(level, logging.WARNING))
    for name in ("quire", "engine"):
        logging.getLogger(name).setLevel(level)
    if options.form == "json":
        _catch_the_rest()
    return handler


def _catch_the_rest() -> None:
    """What Python itself would write to stderr, in lines of its own making."""
    log = logging.getLogger("python")

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            log.critical("uncaught %s", kind.__name__, exc_info=(kind, error, trace))

    def uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            uncaught(args.exc_type, args.exc_value, args.exc_traceback)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if args.exc_value is not None:
            uncaught(args.exc_type, args.exc_value, args.exc_traceback)

    def warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        log.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    sys.unraisablehook = unraisable
    warnings.showwarning = warned  # type: ignore[assignment]
