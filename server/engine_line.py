"""What the engine did in the last seconds, in one line of the log; nothing while it does nothing.

Knows snapshots and the differences between two; does not know who logs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from engine.client import EngineClient
from engine.types import EngineSnapshot, StepRun

logger = logging.getLogger("quire.engine")

INTERVAL_S = 10.0


class EngineLine:
    """Compares snapshots. The line after the last work says that it is idle, and then there are no more."""

    def __init__(self) -> None:
        self._before = EngineSnapshot()

    def next(self, now: EngineSnapshot, seconds: float) -> tuple[str, dict[str, Any]] | None:
        """The line and its fields; None where nothing ran.

        Args:
            seconds: since the last call.
        """
        before = self._before
        self._before = now
        if now.steps < before.steps:  # a new engine counts from zero
            before = EngineSnapshot()
        if now.steps == before.steps and not now.running and not now.waiting:
            return None
        fields = _fields(before, now, max(seconds, 0.001))
        return _text(fields), fields


def _fields(before: EngineSnapshot, now: EngineSnapshot, seconds: float) -> dict[str, Any]:
    def grown(name: str) -> int:
        return max(0, int(getattr(now, name)) - int(getattr(before, name)))

    looked_up = grown("prefix_query_tokens")
    return {
        "interval_s": round(seconds, 3),
        "running": now.running,
        "waiting": now.waiting,
        "prompt_tokens_per_s": round(grown("prompt_tokens") / seconds, 1),
        "generated_tokens_per_s": round(grown("generated_tokens") / seconds, 1),
        "blocks_in_use": now.blocks_in_use,
        "blocks_cached": now.blocks_cached,
        "blocks_free": now.blocks_free,
        "blocks_total": now.blocks_total,
        "hit_ratio": round(grown("prefix_hit_tokens") / looked_up, 4) if looked_up else None,
        "preemptions": grown("preemptions"),
        "graph_ratio": _graph_ratio(before, now),
    }


def _graph_ratio(before: EngineSnapshot, now: EngineSnapshot) -> float | None:
    """The share of steps that ran as CUDA graphs; None where there are none."""
    grown = {run: now.step_runs.get(run, 0) - before.step_runs.get(run, 0) for run in StepRun}
    del grown[StepRun.OFF]
    steps = sum(grown.values())
    return round(sum(n for run, n in grown.items() if run.how != "eager") / steps, 4) if steps else None


def _text(fields: dict[str, Any]) -> str:
    in_use, cached, free = shares(fields["blocks_in_use"], fields["blocks_cached"], fields["blocks_free"])
    prompt, generated = fields["prompt_tokens_per_s"], fields["generated_tokens_per_s"]
    busy = fields["running"] or fields["waiting"]
    parts = [
        f"{fields['running']} running, {fields['waiting']} waiting" if busy else "idle now",
        f"{prompt:.0f} prompt + {generated:.0f} generated tokens/s",
        f"pool {in_use} in use, {cached} cached, {free} free",
    ]
    if fields["hit_ratio"] is not None:
        parts.append(f"{fields['hit_ratio']:.0%} of prompt tokens cached")
    if fields["graph_ratio"] is not None:
        parts.append(f"{fields['graph_ratio']:.0%} of steps as graphs")
    if fields["preemptions"]:
        parts.append(f"{fields['preemptions']} preempted")
    return " | ".join(parts)


def shares(*counts: int) -> list[str]:
    """Percentages; what is there but too little to show is "<1%"."""
    total = sum(counts)
    return ["<1%" if 0 < count < total / 100 else f"{count / total if total else 0:.0%}" for count in counts]


async def watch(client: EngineClient, interval_s: float = INTERVAL_S) -> None:
    """Logs until it is cancelled."""
    line = EngineLine()
    line.next(client.snapshot(), interval_s)
    then_s = time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        now_s = time.monotonic()
        found = line.next(client.snapshot(), now_s - then_s)
        then_s = now_s
        if found is not None:
            logger.info("%s", found[0], extra={"fields": found[1]})
