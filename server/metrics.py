"""What the server and its engine did, for Prometheus.

Knows EngineSnapshot, HTTP outcomes and metric names; does not know routes or replies. Its own registry,
names `quire_*`, base units, and labels from fixed sets only: whatever a client sends, the number of series
stays the same. The hot ones are plain integers that a collector reads, since a locked counter per token
would cost more than writing the token.
"""

from __future__ import annotations

import time
from asyncio import CancelledError
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from starlette.requests import ClientDisconnect

from engine.client import EngineClient
from engine.errors import Draining, Overloaded, RequestError
from engine.types import EngineInfo, EngineSnapshot
from server import __version__
from server.errors import ApiError

APIS = ("chat", "completions")
OUTCOMES = ("ok", "client_error", "aborted", "error", "shed")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# (field of EngineSnapshot, metric, help)
_GAUGES = (
    ("running", "quire_requests_running", "Requests in the running batch."),
    ("waiting", "quire_requests_waiting", "Requests queued for their first or next step."),
    ("tokens_held", "quire_kv_tokens_held", "Tokens whose keys and values running requests hold."),
)
_COUNTERS = (
    ("steps", "quire_engine_steps", "Steps the engine ran."),
    ("prompt_tokens", "quire_prompt_tokens", "Prompt tokens of admitted requests."),
    ("generated_tokens", "quire_generated_tokens", "Tokens generated."),
    ("prefix_query_tokens", "quire_prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    ("prefix_hit_tokens", "quire_prefix_hit_tokens", "Prompt tokens found there and not computed."),
    ("evicted_blocks", "quire_kv_evicted_blocks", "Cached blocks given to something else."),
    ("preemptions", "quire_preemptions", "Requests set back to the queue for lack of blocks."),
    ("recomputed_tokens", "quire_recomputed_tokens", "Tokens computed again after a preemption."),
)


class FastHistogram:
    """A histogram that is cheap to write: one bisection and three additions, no lock."""

    def __init__(self, name: str, help_text: str, buckets: Sequence[float]) -> None:
        self.name = name
        self.help_text = help_text
        self.buckets = tuple(buckets)
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.buckets, value)] += times
        self.sum += value * times

    def family(self) -> HistogramMetricFamily:
        total = 0
        cumulated = []
        for bound, count in zip((*self.buckets, float("inf")), self.counts, strict=True):
            total += count
            cumulated.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        return HistogramMetricFamily(self.name, self.help_text, buckets=cumulated, sum_value=self.sum)


class RequestMetrics:
    """What is noted of one request while it runs. Exactly one outcome is counted."""

    def __init__(self, metrics: Metrics, api: str) -> None:
        self._metrics = metrics
        self._api = api
        self._started_s = time.monotonic()
        self._last_s: dict[int, float] = {}
        self._done = False

    def tokens(self, choice: int, count: int) -> None:
        """Notes that a choice grew by `count` tokens just now."""
        if not count:
            return
        now_s = time.monotonic()
        last_s = self._last_s.get(choice)
        if last_s is not None:
            self._metrics.inter_token_s.observe((now_s - last_s) / count, count)
        elif not self._last_s:
            self._metrics.first_token_s.observe(now_s - self._started_s)
        self._last_s[choice] = now_s

    def failed(self, exc: BaseException) -> None:
        """Counts the outcome that an exception means. Later ones are not counted."""
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
        self._metrics.outcomes[self._api, outcome] += 1
        if outcome == "ok":
            self._metrics.request_s.observe(time.monotonic() - self._started_s)


class Metrics:
    """All series of one server."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._info: EngineInfo | None = None
        self._model = ""
        self.first_token_s = FastHistogram(
            "quire_time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT_S
        )
        self.inter_token_s = FastHistogram(
            "quire_inter_token_seconds", "Between two tokens of one choice.", _INTER_TOKEN_S
        )
        self.request_s = FastHistogram(
            "quire_request_duration_seconds",
            "From arrival to the last token, of requests that ended well.",
            _REQUEST_S,
        )
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.received: Counter[str] = Counter()
        self.unknown_fields: Counter[str] = Counter()
        self.active_requests = 0
        self.http: Counter[tuple[str, str, int]] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def engine_started(self, info: EngineInfo, model_name: str) -> None:
        self._info = info
        self._model = model_name

    def begin(self, api: str) -> RequestMetrics:
        """Notes that a generation request has arrived."""
        self.received[api] += 1
        return RequestMetrics(self, api)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from _engine_families(self._snapshot())
        yield from self._server_families()

    def _snapshot(self) -> EngineSnapshot:
        return self._client.snapshot() if self._info is not None else EngineSnapshot()

    def _server_families(self) -> Iterator[Metric]:
        yield _labelled(
            "quire_http_requests",
            "HTTP requests answered.",
            ("method", "route", "status"),
            (((method, route, str(status)), count) for (method, route, status), count in self.http.items()),
        )
        yield GaugeMetricFamily(
            "quire_http_requests_active", "HTTP requests being answered.", value=self.active_requests
        )
        yield _labelled(
            "quire_requests_received",
            "Generation requests received.",
            ("api",),
            (((api,), self.received[api]) for api in APIS),
        )
        yield _labelled(
            "quire_requests",
            "Generation requests by how they ended; they add up to those received and not in flight.",
            ("api", "outcome"),
            (((api, outcome), self.outcomes[api, outcome]) for api in APIS for outcome in OUTCOMES),
        )
        yield _labelled(
            "quire_unknown_request_fields",
            "Request fields that were taken and ignored.",
            ("api",),
            (((api,), self.unknown_fields[api]) for api in APIS),
        )
        yield self.first_token_s.family()
        yield self.inter_token_s.family()
        yield self.request_s.family()
        restarts = getattr(self._client, "restarts", 0)
        yield CounterMetricFamily(
            "quire_engine_restarts", "Times a new engine replaced a dead one.", value=restarts
        )
        healthy = self._info is not None and self._client.health() is None
        yield GaugeMetricFamily(
            "quire_engine_up", "1 while the engine lives and makes progress.", value=int(healthy)
        )
        yield InfoMetricFamily("quire_build", "What is running.", value=self._build())

    def _build(self) -> dict[str, str]:
        if self._info is None:
            return {"version": __version__}
        info = self._info
        return {
            "version": __version__,
            "model": self._model,
            "architecture": info.architecture,
            "dtype": info.dtype,
            "device": info.device,
            "backend": info.backend,
            "block_size": str(info.block_size),
        }


def _engine_families(snapshot: EngineSnapshot) -> Iterator[Metric]:
    for field, name, text in _GAUGES:
        yield GaugeMetricFamily(name, text, value=getattr(snapshot, field))
    for field, name, text in _COUNTERS:
        yield CounterMetricFamily(name, text, value=getattr(snapshot, field))
    blocks = GaugeMetricFamily(
        "quire_kv_blocks", "Blocks of the KV pool by state; the three add up to the pool.", labels=("state",)
    )
    blocks.add_metric(("in_use",), snapshot.blocks_in_use)
    blocks.add_metric(("cached",), snapshot.blocks_cached)
    blocks.add_metric(("free",), snapshot.blocks_free)
    yield blocks
    yield GaugeMetricFamily(
        "quire_kv_blocks_shared", "Blocks in use by more than one request.", value=snapshot.blocks_shared
    )
    yield GaugeMetricFamily("quire_kv_pool_blocks", "Size of the KV pool.", value=snapshot.blocks_total)
    usage = snapshot.blocks_in_use / snapshot.blocks_total if snapshot.blocks_total else 0.0
    yield GaugeMetricFamily("quire_kv_usage_ratio", "Blocks in use, of all.", value=usage)
    yield _labelled(
        "quire_engine_requests_finished",
        "Choices the engine ended, by reason.",
        ("reason",),
        (((str(reason),), count) for reason, count in sorted(snapshot.requests_finished.items())),
    )


def _labelled(
    name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in samples:
        family.add_metric(values, count)
    return family
