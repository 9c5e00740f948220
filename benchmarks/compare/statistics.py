"""Medians, spread, and what may be said of two of them. Knows numbers, not servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

K = TypeVar("K")
LEAST_RUNS = 3


@dataclass(frozen=True)
class Summary:
    """Some runs of one figure."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        return cls(median(values), min(values), max(values), len(values))

    @property
    def spread(self) -> float:
        """From the lowest run to the highest, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Comparison:
    """One figure against the best of the peers.

    Attributes:
        ratio: ours to theirs.
        verdict: "ahead", "behind", "tie" (the gap is under the wider spread), or "too few runs" to know.
    """

    peer: str
    ratio: float
    verdict: str


def compare(ours: Summary, peers: Mapping[str, Summary], *, higher_is_better: bool) -> Comparison | None:
    """Against the peer whose median is best; None where there is no peer."""
    if not peers:
        return None
    choose: Callable[..., str] = max if higher_is_better else min
    name = choose(peers, key=lambda peer: peers[peer].median)
    theirs = peers[name]
    ratio = ours.median / theirs.median if theirs.median else 0.0
    return Comparison(name, ratio, _verdict(ours, theirs, (ratio > 1) == higher_is_better))


def _verdict(ours: Summary, theirs: Summary, better: bool) -> str:
    if min(ours.count, theirs.count) < LEAST_RUNS:
        return "too few runs"
    gap = abs(ours.median - theirs.median) / min(ours.median, theirs.median)
    if gap <= max(ours.spread, theirs.spread):
        return "tie"
    return "ahead" if better else "behind"


def undisturbed(
    run: Callable[[int], K], others_cores: Callable[[K], float], limit_cores: float, attempts: int
) -> tuple[K, list[K]]:
    """Repeats a run until nothing else took more than `limit_cores`, at most `attempts` times.

    Args:
        run: given the number of the attempt, from 0.

    Returns:
        The least disturbed run, and the others in their order.
    """
    runs: list[K] = []
    for attempt in range(attempts):
        runs.append(run(attempt))
        if others_cores(runs[-1]) <= limit_cores:
            break
    best = min(range(len(runs)), key=lambda i: others_cores(runs[i]))
    return runs[best], runs[:best] + runs[best + 1 :]
