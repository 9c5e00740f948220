"""What `benchmarks/gpu.sh` found: what the tests said, and each figure beside its goals.

python -m benchmarks.gpu_summary benchmarks/results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """A figure, what it should be at first, and what it should become. `sign` 1: more is better."""

    file: str
    where: tuple[tuple[str, Any], ...]
    figure: str
    name: str
    first: float
    then: float
    sign: int = 1
    factor: float = 1.0


def _decode_goals() -> Iterator[Goal]:
    shares = {
        "qwen3-0.6b": ((1, 35, 55), (32, 50, 70), (256, 60, 80)),
        "llama-3.1-8b": ((1, 75, 88), (32, 70, 85), (256, 60, 75)),
    }
    for model, goals in shares.items():
        for batch, first, then in goals:
            where = (("model", model), ("batch", batch), ("deterministic", False))
            file, at = f"gpu-decode-{model}.json", f"{model}, {batch} x 1k"
            yield Goal(file, where, "share_of_bound", f"decode, {at}: % of bound", first, then, factor=100)
            yield Goal(file, where, "idle_us", f"decode, {at}: GPU idle, us a step", 150, 20, sign=-1)


def _kernel_goals() -> Iterator[Goal]:
    file, block = "gpu-kernels.json", ", block 64"

    def at(op: str, shape: str) -> tuple[tuple[str, Any], ...]:
        return ("op", op), ("shape", shape + block)

    large, small = at("decode", "32/8 heads, 32 x 4096"), at("decode", "32/8 heads, 32 x 1024")
    yield Goal(file, large, "share", "decode attention, 537 MB: % of copy bandwidth", 80, 90, factor=100)
    yield Goal(file, small, "share", "decode attention, 134 MB: % of copy bandwidth", 65, 80, factor=100)
    one, prompt = at("decode", "32/8 heads, 1 x 1024"), at("prefill", "32/8 heads, 1 x 8192 of 8192")
    yield Goal(file, one, "microseconds", "decode attention, 1 x 1k: us", 14, 8, sign=-1)
    yield Goal(file, prompt, "rate", "prefill attention, 8k: TFLOP/s", 300, 420)


def _deterministic_goals() -> Iterator[Goal]:
    where = (("deterministic", True),)
    figures = [
        (f"gpu-decode-{model}.json", (*where, ("batch", batch)), f"{model}, {batch} x 1k")
        for model in ("qwen3-0.6b", "llama-3.1-8b")
        for batch in (1, 32, 256)
    ]
    figures.append(("gpu-engine-qwen3-0.6b.json", where, "256 requests, qwen3-0.6b"))
    for file, at, name in figures:
        name = f"deterministic, {name}: % more time"
        yield Goal(file, at, "deterministic_cost", name, 35, 15, sign=-1, factor=100)


GOALS = (
    *_kernel_goals(),
    *_decode_goals(),
    *_deterministic_goals(),
    Goal("gpu-start.json", (("kernels", "not compiled yet"),), "first_token_s",
         "start to first token, s, qwen3-0.6b, kernels not compiled", 10, 10, sign=-1),
    Goal("gpu-start.json", (("kernels", "compiled before"),), "first_token_s",
         "start to first token, s, qwen3-0.6b", 10, 10, sign=-1),
    Goal("gpu-engine-qwen3-0.6b.json", (("deterministic", False),), "output_tokens_per_s",
         "256 requests, qwen3-0.6b: tok/s", 14_000, 24_000),
    Goal("gpu-engine-llama-3.1-8b.json", (), "output_tokens_per_s",
         "256 requests, llama-3.1-8b: tok/s", 7_000, 9_800),
)  # fmt: skip


def find(goal: Goal, folder: Path) -> float | None:
    """The figure; None where it was not measured."""
    path = folder / goal.file
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if record.get("settings", {}).get("dry_run"):
        return None
    for row in record["results"]:
        if all(row.get(key) == value for key, value in goal.where) and goal.figure in row:
            return float(row[goal.figure]) * goal.factor
    return None


def verdict(goal: Goal, value: float | None) -> str:
    if value is None:
        return "not measured"
    if goal.sign * value >= goal.sign * goal.then:
        return "reached"
    return "first goal" if goal.sign * value >= goal.sign * goal.first else "missed"


def correctness(folder: Path) -> Iterator[str]:
    """What the tests on the GPU said, the names of those that failed beneath."""
    path = folder / "gpu-correct.json"
    record = json.loads(path.read_text()) if path.exists() else {"settings": {"dry_run": True}}
    if record["settings"]["dry_run"]:
        yield "tests on the GPU: not run"
        return
    (found,) = record["results"]
    counts = ", ".join(f"{found[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    end = "" if found["finished"] else "; STOPPED before the last one"
    yield f"tests on the GPU: {counts} in {found['seconds']:.0f} s{end}"
    yield from (f"  failed: {name}" for name in found["failures"])


def lines(folder: Path) -> Iterator[str]:
    yield from correctness(folder)
    yield f"{'figure':58} {'measured':>10} {'first':>8} {'then':>8}"
    for goal in GOALS:
        value = find(goal, folder)
        shown = "-" if value is None else f"{value:,.1f}"
        yield f"{goal.name:58} {shown:>10} {goal.first:>8,.0f} {goal.then:>8,.0f}  {verdict(goal, value)}"
    for path in sorted(folder.glob("gpu-*.json")):
        machine = json.loads(path.read_text()).get("machine", {})
        gpu, driver = machine.get("gpu", "no GPU"), machine.get("driver", "?")
        yield f"{path.name}: {gpu}, driver {driver}, commit {machine.get('commit', '?')}"


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1] if sys.argv[1:] else "benchmarks/results"))))
