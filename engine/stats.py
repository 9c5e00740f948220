"""Histograms that are cheap to write, and the bounds of those the engine keeps. Standard library only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from engine.views import HistogramData

# 1 ms to 10 min, three bounds a decade.
SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
    600.0,
)  # fmt: skip
STEP_SECONDS = (0.0002, 0.0005, *SECONDS[:12])
AGE_SECONDS = (
    0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0,
)  # fmt: skip
POWERS_OF_TWO = tuple(float(2**k) for k in range(16))
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

# The engine's own, by their names in EngineSnapshot.histograms.
BUCKETS: Mapping[str, Sequence[float]] = {
    "queue_s": SECONDS,  # a request's arrival to its first admission
    "prefill_s": SECONDS,  # first admission to the first token
    "decode_s": SECONDS,  # a choice's first token to its last
    "step_s": STEP_SECONDS,
    "step_tokens": POWERS_OF_TWO,
    "step_sequences": POWERS_OF_TWO,
    "hit_ratio": SHARES,  # prompt tokens reused, of a request's
    "block_age_s": AGE_SECONDS,  # at eviction, since the block was taken
    "block_idle_s": AGE_SECONDS,  # at eviction, since it was last used
    "block_reuse_gap_s": AGE_SECONDS,  # at reuse, since it was last used
}


class Histogram:
    """One bisection and three additions per observation, no lock."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value into the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def data(self) -> HistogramData:
        return HistogramData(tuple(self.counts), self.total)
