"""What the server itself notes of its requests: counts and latencies, as plain integers.

Knows exceptions and what they mean for the books; does not know Prometheus. A locked counter per token would
cost more than writing the token, so a collector reads these when it is asked.
"""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections import Counter

from starlette.requests import ClientDisconnect

from engine.errors import ContextTooLong, Draining, EngineDead, NeverFits, Overloaded, RequestError
from engine.stats import SECONDS, Histogram
from server.errors import ApiError

APIS = ("chat", "completions", "responses", "messages", "embeddings")
OUTCOMES = ("ok", "client_error", "aborted", "error", "shed")
REFUSALS = ("queue_full", "too_long", "never_fits", "draining", "loading", "engine_down", "invalid")

# The nearest class first.
_REFUSAL_OF = (
    (Overloaded, "queue_full"),
    (Draining, "draining"),
    (EngineDead, "engine_down"),
    (ContextTooLong, "too_long"),
    (NeverFits, "never_fits"),
    (RequestError, "invalid"),
)
# Of refusals the server writes itself; see Service.why_not_ready.
_REFUSAL_OF_CODE = {"loading": "loading", "shutting_down": "draining", "engine_unavailable": "engine_down"}


class Records:
    """The server's own books."""

    def __init__(self) -> None:
        self.first_token_s = Histogram(SECONDS)
        self.inter_token_s = Histogram(SECONDS)
        self.request_s = Histogram(SECONDS)
        self.received: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[str] = Counter()
        self.unknown_fields: Counter[str] = Counter()
        self.active_requests = 0
        self.http: Counter[tuple[str, str, int]] = Counter()

    def begin(self, api: str) -> RequestMetrics:
        """Notes that a generation request has arrived."""
        self.received[api] += 1
        return RequestMetrics(self, api)


class RequestMetrics:
    """What is noted of one request while it runs. Exactly one outcome is counted."""

    def __init__(self, records: Records, api: str) -> None:
        self._records = records
        self._api = api
        self._started_s = time.monotonic()
        self._last_s: dict[int, float] = {}
        self._admitted = False
        self._done = False

    def admitted(self) -> None:
        """Notes that the engine took it: what goes wrong from now on is no refusal."""
        self._admitted = True

    def tokens(self, choice: int, count: int) -> None:
        """Notes that a choice grew by `count` tokens just now."""
        if not count:
            return
        now_s = time.monotonic()
        last_s = self._last_s.get(choice)
        if last_s is not None:
            self._records.inter_token_s.observe((now_s - last_s) / count, count)
        elif not self._last_s:
            self._records.first_token_s.observe(now_s - self._started_s)
        self._last_s[choice] = now_s

    def failed(self, exc: BaseException) -> None:
        """Counts the outcome that an exception means. Later ones are not counted."""
        if not self._done and not self._admitted and (reason := refusal(exc)) is not None:
            self._records.refused[reason] += 1
        if isinstance(exc, (Overloaded, Draining)):
            self.ended("shed")
        elif isinstance(exc, (ClientDisconnect, CancelledError, GeneratorExit)):
            self.ended("aborted")
        elif isinstance(exc, RequestError) or (isinstance(exc, ApiError) and exc.status < 500):
            self.ended("client_error")
        else:
            self.ended("shed" if isinstance(exc, ApiError) and exc.status == 503 else "error")

    def ended(self, outcome: str) -> None:
        if self._done:
            return
        self._done = True
        self._records.outcomes[self._api, outcome] += 1
        if outcome == "ok":
            self._records.request_s.observe(time.monotonic() - self._started_s)


def refusal(exc: BaseException) -> str | None:
    """Which refusal an exception is; None where nobody refused: a fault, a caller who left."""
    if isinstance(exc, ApiError):
        return _REFUSAL_OF_CODE.get(exc.code, "invalid" if exc.status < 500 else None)
    return next((reason for kind, reason in _REFUSAL_OF if isinstance(exc, kind)), None)
