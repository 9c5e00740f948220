"""The last 15 minutes, a sample every two seconds, whether or not anybody watches.

Knows the engine's counters and the server's histograms, and makes rates, percentiles and shares of their
differences; does not know who reads them. A new engine counts from zero: its first sample holds what it did
since, never less than nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.types import EngineSnapshot
from server.metrics import WHATIF_KEYS, Metrics

INTERVAL_S = 2.0
KEPT_S = 900.0

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Reading:
    """All counters at one moment; `restarts` tells engines apart."""

    at_s: float
    restarts: int
    snapshot: EngineSnapshot
    counts: dict[str, float]  # of this engine, from its start
    first_token: Sequence[int]
    inter_token: Sequence[int]


class History:
    """Samples of one server, oldest first.

    Args:
        metrics: asked once per sample.
        clock, wall_clock: seconds that only grow; seconds since 1970.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._interval_s = interval_s
        self._clock = clock
        self._wall_clock = wall_clock
        kept = max(1, round(KEPT_S / interval_s))
        self._samples: deque[Sample] = deque(maxlen=kept)
        self._looked_up: deque[dict[str, float]] = deque(maxlen=kept)  # per sample, for the window's shares
        self._taken = 0
        self._before = self._read()
        self._news = asyncio.Event()  # set, and replaced, with each sample
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """Samples from now on, in a task of the running loop."""
        self._before = self._read()
        self._task = asyncio.create_task(self._run(), name="history")

    async def stop(self) -> None:
        """Ends the sampling, and with it every `follow`."""
        self._stopped = True
        self._news.set()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def samples(self) -> list[Sample]:
        """Those kept, ready for JSON. Shared with everybody: not to be changed."""
        return list(self._samples)

    def follow(self) -> AsyncIterator[Sample]:
        """Each new sample, from now until `stop`. Who reads slowly misses the oldest."""
        return self._follow(self._taken)

    async def _follow(self, seen: int) -> AsyncIterator[Sample]:
        while not self._stopped:
            news = self._news
            missed = min(self._taken - seen, len(self._samples))
            seen = self._taken
            for sample in list(self._samples)[len(self._samples) - missed :]:
                yield sample
            if seen == self._taken:
                await news.wait()

    async def _run(self) -> None:
        due_s = self._clock()
        while True:
            # A late loop makes the next sample longer, not the ones after it shorter.
            due_s = max(due_s + self._interval_s, self._clock())
            await asyncio.sleep(due_s - self._clock())
            self.sample()

    def sample(self) -> Sample:
        """Takes one now."""
        before, now = self._before, self._read()
        self._before = now
        added = _increases(now, before)
        self._looked_up.append({name: added[name] for name in ("query_tokens", "hit_tokens", *WHATIF_KEYS)})
        sample = {
            "t": round(self._wall_clock(), 3),
            **_state(now.snapshot),
            **_rates(added, now.at_s - before.at_s),
            **_latencies("ttft", self._metrics.first_token_s.bounds, now.first_token, before.first_token),
            **_latencies(
                "inter_token", self._metrics.inter_token_s.bounds, now.inter_token, before.inter_token
            ),
            **self._shares(now.snapshot),
        }
        self._samples.append(sample)
        self._taken += 1
        self._news.set()
        self._news = asyncio.Event()
        return sample

    def _read(self) -> _Reading:
        state = self._metrics.state()
        return _Reading(
            self._clock(),
            state.restarts,
            state.snapshot,
            _counts(state.snapshot),
            tuple(self._metrics.first_token_s.counts),
            tuple(self._metrics.inter_token_s.counts),
        )

    def _shares(self, snapshot: EngineSnapshot) -> Sample:
        """Of the prompt tokens looked up in the time kept: found, and what other pools would have found."""
        queries = sum(added["query_tokens"] for added in self._looked_up)

        def share(name: str) -> float | None:
            return round(sum(added[name] for added in self._looked_up) / queries, 4) if queries else None

        told = snapshot.whatif_hit_tokens
        return {
            "whatif": {size: share(size) if size in told else None for size in WHATIF_KEYS},
            "hit_ratio": share("hit_tokens"),
        }


def _counts(snapshot: EngineSnapshot) -> dict[str, float]:
    """What only grows while an engine lives."""
    return {
        "steps": snapshot.steps,
        "prompt_tokens": snapshot.prompt_tokens,
        "generated_tokens": snapshot.generated_tokens,
        "hit_tokens": snapshot.prefix_hit_tokens,
        "query_tokens": snapshot.prefix_query_tokens,
        "evictions": sum(snapshot.evicted_blocks.values()),
        "preemptions": snapshot.preemptions,
        "busy_s": snapshot.busy_s,
        **{size: snapshot.whatif_hit_tokens.get(size, 0) for size in WHATIF_KEYS},
    }


def _increases(now: _Reading, before: _Reading) -> dict[str, float]:
    """Since the reading before; since the engine's start if it is another engine."""
    new, old = now.counts, before.counts
    restarted = now.restarts != before.restarts or any(new[name] < old[name] for name in new)
    return new if restarted else {name: new[name] - old[name] for name in new}


def _state(snapshot: EngineSnapshot) -> Sample:
    return {
        "running": snapshot.running,
        "waiting": snapshot.waiting,
        "blocks": block_counts(snapshot),
        "tokens_held": snapshot.tokens_held,
        "tenants": {
            name: {"in_use": use.blocks_in_use, "cached": use.blocks_cached}
            for name, use in snapshot.tenants.items()
        },
    }


def block_counts(snapshot: EngineSnapshot) -> dict[str, int]:
    """By state; the shared ones are among those in use."""
    return {
        "in_use": snapshot.blocks_in_use,
        "shared": snapshot.blocks_shared,
        "cached": snapshot.blocks_cached,
        "free": snapshot.blocks_free,
    }


def _rates(added: dict[str, float], seconds: float) -> Sample:
    def rate(name: str) -> float:
        return round(added[name] / seconds, 3) if seconds > 0 else 0.0

    return {
        "prompt_tokens_per_s": rate("prompt_tokens"),
        "generated_tokens_per_s": rate("generated_tokens"),
        "hit_tokens_per_s": rate("hit_tokens"),
        "query_tokens_per_s": rate("query_tokens"),
        "evictions_per_s": rate("evictions"),
        "preemptions_per_s": rate("preemptions"),
        # A snapshot tells of whole steps: one that began earlier may end in this interval.
        "busy_share": min(1.0, rate("busy_s")),
    }


def _latencies(name: str, bounds: Sequence[float], new: Sequence[int], old: Sequence[int]) -> Sample:
    counts = [after - before for after, before in zip(new, old, strict=True)]
    return {
        f"{name}_p50_s": quantile(0.5, bounds, counts),
        f"{name}_p95_s": quantile(0.95, bounds, counts),
    }


def quantile(share: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """The value below which a share of the observations lies, on a straight line within its bucket.

    As Prometheus' histogram_quantile: what lies above the last bound counts as that bound.

    Args:
        counts: by bucket, one more than bounds.

    Returns:
        None of nothing.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    seen, low = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if wanted <= seen + count:
            return round(low + (bound - low) * (wanted - seen) / count, 6)
        seen, low = seen + count, bound
    return low
