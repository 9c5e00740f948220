"""Every error that leaves the engine, in one tree.

    QuireError
    |-- ConfigError            start-up: what was asked cannot work
    |   |-- ModelError         the checkpoint: missing, unsupported, unsafe or corrupt
    |   `-- MemoryPlanError    weights or KV pool do not fit the machine
    |-- RequestError           this request is at fault; nobody else is harmed
    |   |-- InvalidRequest     a value out of range
    |   |-- ContextTooLong     prompt + max_tokens exceed the model's context
    |   `-- NeverFits          larger than the whole KV pool
    |-- Overloaded             the queue is full; try again after `retry_after_s`
    |-- Draining               the server is shutting down
    |-- RequestFailed          one request broke inside the engine
    `-- EngineDead             the engine process is gone or stuck

The message is for the person who made the request: what was wrong, where, what to do. It never holds
a path, an address, a traceback or somebody else's text.
"""

from __future__ import annotations


class QuireError(Exception):
    """The root; never raised itself."""


class ConfigError(QuireError):
    """What was asked for at start-up cannot work."""


class ModelError(ConfigError):
    """The checkpoint is missing, unsupported, unsafe or corrupt."""


class MemoryPlanError(ConfigError):
    """Weights or KV pool do not fit the machine."""


class RequestError(QuireError):
    """The request is at fault.

    Args:
        message: one sentence for the caller.
        param: the request field at fault, if one is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(RequestError):
    """A value out of range."""


class ContextTooLong(RequestError):
    """Prompt and max_tokens exceed the model's context."""


class NeverFits(RequestError):
    """The request needs more KV blocks than the pool has."""


class Overloaded(QuireError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(QuireError):
    """The server is shutting down and takes no new requests."""


class RequestFailed(QuireError):
    """One request broke inside the engine; the others go on."""


class EngineDead(QuireError):
    """The engine process is gone or makes no progress."""
