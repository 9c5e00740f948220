"""What of the log is the server's own: how it was told to log, and which request a line belongs to.

Knows settings and request ids; how a record becomes a line is engine.logs'.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import TextIO

from engine import logs
from engine.logs import LogOptions
from server.settings import ServerSettings

logger = logging.getLogger("quire")

# Of the HTTP request that is being answered: set by the outermost middleware, "" elsewhere.
request_id: ContextVar[str] = ContextVar("request_id", default="")


def log_options(settings: ServerSettings, stream: TextIO = sys.stderr) -> LogOptions:
    """For both processes: they write to the same place."""
    terminal = stream.isatty()
    return LogOptions(settings.log_level, settings.log_format, terminal, terminal and settings.colour)


def configure_logging(options: LogOptions, stream: TextIO | None = None) -> None:
    """One line per event, to stderr."""
    handler = logs.configure(options, stream)
    handler.addFilter(_add_request_id)
    # Its notes on bad requests are a client's doing; ours say the same in the access log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def warn_of_prompts() -> None:
    """The operator should know what is in the log from here on."""
    logger.warning("--log-prompts: the log will hold what users write. For debugging only.")


def complain(message: str, code: int) -> int:
    """Says in the log why the program ends, where the log is all that is read."""
    logger.critical("%s", " ".join(message.split()))
    return code


def _add_request_id(record: logging.LogRecord) -> bool:
    current = request_id.get()
    if current:
        record.fields = {"request_id": current, **getattr(record, "fields", {})}
    return True


def milliseconds(seconds: float) -> float:
    """For fields."""
    return round(seconds * 1000, 3)


def duration(seconds: float) -> str:
    """For people: 0.0013 -> "1.3 ms", 0.381 -> "381 ms", 12.34 -> "12.3 s"."""
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
