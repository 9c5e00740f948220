"""What is known of one HTTP request once it is answered: for its lines in the log and its spans.

Knows what happened and when; does not know how that is written down. It is filled in on the way, a few times
per request and never per token, and read once, at the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from starlette.types import Scope

from engine.errors import QuireError
from engine.types import TokenEvent
from server.errors import ApiError, to_api_error

if TYPE_CHECKING:
    from server.generation import Generation

_SCOPE_KEY = "quire.trail"


@dataclass(slots=True)
class PromptTimes:
    """When one prompt of a request got where.

    Attributes:
        queued_s: from the engine's taking it to its first admission; None if the engine did not say.
        first_s, last_s: its first event and its choices' last one, by the monotonic clock.
    """

    queued_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None


class Timeline:
    """A generation's times, prompt by prompt, and how its choices ended."""

    def __init__(self, prompts: int) -> None:
        self.submitted_s: float | None = None
        self.prompts = [PromptTimes() for _ in range(prompts)]
        self.finish_reasons: list[str] = []

    def submitted(self) -> None:
        self.submitted_s = time.monotonic()

    def note(self, position: int, event: TokenEvent) -> None:
        """Takes the first event of each prompt and the last of each choice."""
        now_s, times = time.monotonic(), self.prompts[position]
        if times.first_s is None:
            times.first_s = now_s
            times.queued_s = event.queued_s
        if event.finish_reason is not None:
            times.last_s = now_s
            self.finish_reasons.append(event.finish_reason.value)

    @property
    def first_s(self) -> float | None:
        """When the request's first token was there."""
        return min((times.first_s for times in self.prompts if times.first_s is not None), default=None)

    @property
    def queued_s(self) -> float | None:
        """The longest wait of a prompt."""
        return max((times.queued_s for times in self.prompts if times.queued_s is not None), default=None)


@dataclass(slots=True)
class Trail:
    """One HTTP request.

    Attributes:
        request_id: as in the reply's `x-request-id`.
        method, path: one of the known ones; cut, but as the caller sent it.
        parents: the request's `traceparent` and `tracestate`, where somebody traces.
        started_s, started_unix_s: the same moment by two clocks. seconds: from then to the end.
        api: one of metrics.APIS, "" for everything else. stream: None if unknown.
        generation: from when it is submitted.
        error: the code of the error that the caller was told, or would have been.
    """

    request_id: str
    method: str
    path: str
    client: str
    parents: dict[str, str] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)
    started_unix_s: float = field(default_factory=time.time)
    status: int = 0
    seconds: float = 0.0
    tenant: str = ""
    api: str = ""
    stream: bool | None = None
    generation: Generation | None = None
    error: str = ""

    def attach(self, scope: Scope) -> None:
        """From here on `trail_of` finds it."""
        scope[_SCOPE_KEY] = self

    def ended(self, status: int) -> None:
        self.status = status
        self.seconds = time.monotonic() - self.started_s
        generation = self.generation
        if generation is not None and not self.error:
            if generation.error is not None:
                self.failed(generation.error)
            elif generation.aborted:
                self.error = "client_closed_request"

    def failed(self, error: BaseException) -> None:
        """Keeps the code of the first error."""
        if not self.error:
            self.error = _code(error)

    @property
    def server_failed(self) -> bool:
        """It was our fault; a stream says 200 before that is known."""
        return self.status >= 500 or (self.status < 400 and self.error not in ("", "client_closed_request"))


def trail_of(scope: Scope) -> Trail:
    """The request's trail; one that nobody reads where the outermost middleware is missing."""
    found: Trail = scope.get(_SCOPE_KEY) or Trail("", "", "", "")
    return found


def _code(error: BaseException) -> str:
    if isinstance(error, ApiError | QuireError):
        return to_api_error(error).code
    known = {"ClientDisconnect": "client_closed_request", "CancelledError": "shutting_down"}
    return known.get(type(error).__name__, "internal_error")


class Tracer(Protocol):
    """Where trails of generation requests go, if somebody traces."""

    def ended(self, trail: Trail, model: str) -> str:
        """Takes a request that has ended; returns its trace's id, "" if it was not sampled."""
        ...


def joined(reasons: Sequence[str]) -> str:
    """Each reason once, in order: "stop", or "stop,length"."""
    return ",".join(dict.fromkeys(reasons))
