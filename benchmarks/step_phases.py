"""Where a decode step spends its time: the executor's parts, in one process, without HTTP.

    python -m benchmarks.step_phases --model 110m --requests 1 --input 128 --output 128 --temperature 0

Medians over the steps that compute one token of every request. Takes the flags of benchmarks.engine.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import engine as throughput
from benchmarks.models import read_spec
from engine.core import EngineCore
from engine.exec import batch

Times = defaultdict[str, list[float]]


def main(argv: list[str] | None = None) -> None:
    args = throughput.parse_args(argv)
    device = torch.device(args.device)
    core = throughput.make_core(args, device)
    times: Times = defaultdict(list)
    _watch(core, times)
    requests = throughput.make_requests(args, read_spec(args.model).vocab_size)
    for i, (prompt, params) in enumerate(requests):
        core.add(f"r{i}", prompt, params)
    _run(core, len(requests), times)
    print(f"{args.model}, {len(requests)} sequences, {len(times['step'])} steps; medians in ms")
    for name, seconds in times.items():
        print(f"{name:32s} {statistics.median(seconds) * 1e3:8.2f}")


def _run(core: EngineCore, sequences: int, times: Times) -> None:
    """Keeps the times of whole decode steps alone."""
    while core.has_work:
        before = {name: len(seconds) for name, seconds in times.items()}
        began = time.perf_counter()
        outputs = core.step()
        times["step"].append(time.perf_counter() - began)
        if len(outputs) != sequences:
            for name, seconds in times.items():
                del seconds[before.get(name, 0) :]


def _watch(core: EngineCore, times: Times) -> None:
    executor: Any = core._executor
    parts = [
        (executor, "forward", "launching the step"),
        (batch, "build", "  its inputs"),
        (executor._model, "forward", "  all layers"),
        (executor._model, "logits", "  the output layer"),
        (executor, "sample", "launching the draw"),
        (executor._sampler, "sample", "  the sampler"),
    ]
    for owner, method, name in parts:
        setattr(owner, method, _timed(getattr(owner, method), times[name]))


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **options)
        seconds.append(time.perf_counter() - began)
        return result

    return timed


if __name__ == "__main__":
    main()
