"""Rounds: every server in turn, started afresh, under every load. Keeps what was found as plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import machine
from benchmarks.compare.engines import PEERS, UNQUANTISED, Engine
from benchmarks.compare.loads import Figures, Load, run_load
from benchmarks.compare.serving import DidNotStart, Launch, Running, running
from benchmarks.compare.statistics import undisturbed

QUANTISED_LOADS = {"W1"}  # where the size of the weights decides
# What must be as it was for an interrupted comparison to go on.
_SAME = ("versions", "models", "loads", "limit_cores", "attempts")


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

    def loads_of(self, engine: Engine) -> list[str]:
        return [name for name in self.loads if engine.group == UNQUANTISED or name in QUANTISED_LOADS]


class Measure(Protocol):
    """Runs a load on a running server; `run_load`, or a fake of it."""

    def __call__(self, load: Load, server: Running, launch: Launch, seed: int) -> Figures: ...


class Start(Protocol):
    """Starts a server for the time of a block; `running`, or a fake of it."""

    def __call__(self, launch: Launch, log: Path) -> AbstractContextManager[Running]: ...


class Findings:
    """What was found so far, written down after every run."""

    def __init__(self, head: dict[str, Any], file: Path | None) -> None:
        self.content: dict[str, Any] = {**head, "starts": [], "runs": [], "absent": []}
        self._file = file

    def resume(self, old: dict[str, Any], plan: Plan) -> None:
        """Takes over what an interrupted comparison found of whole visits to a server.

        Raises:
            ValueError: it compared something else, or on another machine.
        """
        new = self.content
        for name in _SAME:
            if old[name] != new[name]:
                raise ValueError(f"{name} are {new[name]}, and were {old[name]}")
        for name in ("cpu", "cores"):
            if old["machine"][name] != new["machine"][name]:
                raise ValueError(f"the machine is not the same: {new['machine']}, {old['machine']}")
        loads = {str(engine): plan.loads_of(engine) for engine in plan.engines}
        measured = [(*_visit(run), run["load"]) for run in old["runs"]]
        whole = {
            (model, engine, number)
            for model, engine, number, _ in measured
            if all((model, engine, number, load) in measured for load in loads.get(engine, plan.loads))
        }
        kept: dict[str, Any] = {
            kind: [found for found in old[kind] if _visit(found) in whole] for kind in ("starts", "runs")
        }
        head: dict[str, Any] = {name: old[name] for name in ("machine", "limits", "bounds") if name in old}
        self.content = {**new, **head, **kept}

    def has(self, model: str, engine: Engine, number: int) -> bool:
        """Whether a visit was taken over."""
        return any(_visit(found) == (model, str(engine), number) for found in self.content["starts"])

    def add(self, kind: str, model: str, engine: Engine, **values: Any) -> None:
        self.content[kind].append({"model": model, "engine": str(engine), "group": engine.group, **values})
        if self._file is not None:
            machine.save(self._file, self.content)


def _visit(found: dict[str, Any]) -> tuple[str, str, int]:
    return found["model"], found["engine"], found["round"]


class Rounds:
    """Goes through a plan.

    Args:
        say: prints a line.
        start, measure: `running` and `run_load`, or fakes of them.
    """

    def __init__(
        self,
        plan: Plan,
        findings: Findings,
        say: Callable[[str], None],
        start: Start = running,
        measure: Measure = run_load,
    ) -> None:
        self._plan = plan
        self._findings = findings
        self._say = say
        self._start = start
        self._measure = measure

    def run(self) -> None:
        """Each round takes the servers in another order, so that none always follows the same one."""
        for model in self._plan.models:
            present = list(self._plan.engines)
            for number in range(self._plan.repeats):
                first = number % max(1, len(present))
                for engine in present[first:] + present[:first]:
                    if self._findings.has(model, engine, number):
                        continue
                    try:
                        self._run_server(model, engine, number)
                    except DidNotStart as reason:
                        present.remove(engine)
                        self._findings.add("absent", model, engine, round=number, reason=str(reason))
                        self._say(f"{model} {engine}: did not start here: {reason}")

    def _run_server(self, model: str, engine: Engine, number: int) -> None:
        launch = engine.launch(model)
        with self._start(launch, PEERS / "logs" / f"{model}-{engine}.log") as server:
            start = {"ready_s": server.ready_s, "resident_bytes": server.resident_bytes}
            self._findings.add("starts", model, engine, round=number, **start)
            self._say(f"{model} {engine}: {describe_start(server)}")
            for name in self._plan.loads_of(engine):
                found = self._run_load(name, server, launch, number)
                self._findings.add("runs", model, engine, round=number, load=name, **found)
                self._say(f"{model} {engine} {name}: {describe(found)}")

    def _run_load(self, name: str, server: Running, launch: Launch, number: int) -> dict[str, Any]:
        plan = self._plan
        seed = 10 * number + list(plan.loads).index(name)

        def attempt(tries: int) -> Figures:
            return self._measure(plan.loads[name], server, launch, 1000 * tries + seed)

        best, others = undisturbed(attempt, lambda run: run.others_cores, plan.limit_cores, plan.attempts)
        disturbed = best.others_cores > plan.limit_cores
        return {"disturbed": disturbed, **asdict(best), "other_attempts": [asdict(run) for run in others]}


def describe_start(server: Running) -> str:
    """For the terminal."""
    return f"ready in {server.ready_s:.1f} s, {server.resident_bytes / 1e6:,.0f} MB resident"


def describe(run: dict[str, Any]) -> str:
    """One line of a run for the terminal."""
    if run["fault"]:
        return f"failed: {run['fault']}"
    ms = {name: 1000 * run[f"{name}_s"] for name in ("ttft_p50", "ttft_p95", "gap_p50", "gap_p95")}
    return (
        f"{run['tokens_per_s']:.1f} tok/s, first token {ms['ttft_p50']:.0f} / {ms['ttft_p95']:.0f} ms, "
        f"between {ms['gap_p50']:.1f} / {ms['gap_p95']:.1f} ms, others took {run['others_cores']:.2f} cores"
        f"{' (disturbed)' if run['disturbed'] else ''}"
    )
