"""Values -> the families that prometheus_client writes. Counters are named without their `_total`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from engine.views import HistogramData

Rows = Iterable[tuple[Sequence[str], float]]  # (label values, value)


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def gauges(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def counters(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def histogram(
    name: str,
    text: str,
    bounds: Sequence[float],
    data: HistogramData | None,
    labels: Sequence[str] = (),
    values: Sequence[str] = (),
) -> Metric:
    """Without data: a histogram of nothing, so that the series exist from the start."""
    seen = 0
    buckets = []
    for bound, count in zip(_le(tuple(bounds)), data.counts if data else _zeros(len(bounds)), strict=True):
        seen += count
        buckets.append((bound, float(seen)))
    family = HistogramMetricFamily(name, text, labels=labels)
    family.add_metric(values, buckets, data.total if data else 0.0)
    return family


def info(name: str, text: str, labels: dict[str, str]) -> Metric:
    return InfoMetricFamily(name, text, value=labels)


@cache
def _le(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*(str(float(bound)) for bound in bounds), "+Inf")


@cache
def _zeros(bounds: int) -> tuple[int, ...]:
    return (0,) * (bounds + 1)
