"""Rounds: every server in turn, started afresh, under every load. Keeps what was found as plain values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.compare.engines import PEERS, Engine
from benchmarks.compare.loads import Figures, Load, run_load
from benchmarks.compare.serving import DidNotStart, Launch, Running, running
from benchmarks.compare.statistics import undisturbed

QUANTISED_LOADS = {"W1"}  # where the size of the weights decides


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        limit_cores: what others may take of the machine before a run is repeated.
        attempts: how often a disturbed run is tried at most.
    """

    models: Sequence[str]
    engines: Sequence[Engine]
    loads: dict[str, Load]
    repeats: int
    limit_cores: float
    attempts: int


class Measure(Protocol):
    """Runs a load on a running server; `run_load`, or a fake of it."""

    def __call__(self, load: Load, server: Running, launch: Launch, seed: int) -> Figures: ...


class Findings:
    """What was found so far, written down after every run."""

    def __init__(self, head: dict[str, Any], file: Path | None) -> None:
        self.content: dict[str, Any] = {**head, "starts": [], "runs": [], "absent": []}
        self._file = file

    def add(self, kind: str, model: str, engine: Engine, **values: Any) -> None:
        self.content[kind].append({"model": model, "engine": str(engine), "group": engine.group, **values})
        if self._file is not None:
            self._file.write_text(json.dumps(self.content, indent=1) + "\n")


def measure_all(
    plan: Plan,
    findings: Findings,
    say: Callable[[str], None],
    start: Callable[..., Any] = running,
    measure: Measure = run_load,
) -> None:
    """Each round takes the servers in another order, so that none always follows the same one."""
    for model in plan.models:
        present = list(plan.engines)
        for round_number in range(plan.repeats):
            first = round_number % max(1, len(present))
            for engine in present[first:] + present[:first]:
                try:
                    _measure_one(plan, findings, model, engine, round_number, say, start, measure)
                except DidNotStart as reason:
                    present.remove(engine)
                    findings.add("absent", model, engine, round=round_number, reason=str(reason))
                    say(f"{model} {engine}: did not start here: {reason}")


def _measure_one(
    plan: Plan, findings: Findings, model: str, engine: Engine, round_number: int,
    say: Callable[[str], None], start: Callable[..., Any], measure: Measure,
) -> None:  # fmt: skip
    launch = engine.launch(model)
    with start(launch, PEERS / "logs" / f"{model}-{engine}.log") as server:
        megabytes = server.resident_bytes / 1e6
        say(f"{model} {engine}: ready in {server.ready_s:.1f} s, {megabytes:,.0f} MB resident")
        findings.add(
            "starts", model, engine, round=round_number,
            ready_s=server.ready_s, resident_bytes=server.resident_bytes,
        )  # fmt: skip
        for number, (name, load) in enumerate(plan.loads.items()):
            if engine.group != "16 bits" and name not in QUANTISED_LOADS:
                continue

            def attempt(tries: int, load: Load = load, number: int = number) -> Figures:
                seed = 100 * tries + 10 * round_number + number
                return measure(load, server, launch, seed)

            best, others = undisturbed(attempt, lambda run: run.others_cores, plan.limit_cores, plan.attempts)
            disturbed = best.others_cores > plan.limit_cores
            findings.add(
                "runs", model, engine, round=round_number, load=name, disturbed=disturbed,
                **asdict(best), other_attempts=[asdict(run) for run in others],
            )  # fmt: skip
            say(f"{model} {engine} {name}: {describe(best)}{' (disturbed)' if disturbed else ''}")


def describe(run: Figures) -> str:
    """One line for the terminal."""
    if run.fault:
        return run.fault
    first = f"first token {1000 * run.ttft_p50_s:.0f} / {1000 * run.ttft_p95_s:.0f} ms"
    gap = f"between {1000 * run.gap_p50_s:.1f} / {1000 * run.gap_p95_s:.1f} ms"
    return f"{run.tokens_per_s:.1f} tok/s, {first}, {gap}, others took {run.others_cores:.2f} cores"
