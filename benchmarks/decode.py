"""Steady decode of the whole engine, as a share of what the hardware allows; and how long the GPU is idle.

    python -m benchmarks.decode --model qwen3-0.6b --batch 1 32 256

Random weights, prompts of 1024 random tokens, greedy. Prompts are computed and graphs captured before the
clock starts. `idle` is what a step takes less the time in which any kernel runs, by torch's profiler.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks import limits
from benchmarks.engine import (
    MODES,
    TINY,
    add_engine_arguments,
    capture_all,
    make_core,
    note_cost,
    parse,
    release,
    write,
)
from benchmarks.models import read_spec
from engine.core import EngineCore
from engine.types import SamplingParams, StepRun

DRY_RUN = {**TINY, "batch": [1, 2], "context": 40, "steps": 6}


def fill(core: EngineCore, batch: int, context: int, steps: int, vocab_size: int) -> None:
    """Has `batch` requests of `context` tokens running, with room for the steps, and all graphs captured."""
    draw = random.Random(batch)
    for i in range(batch):
        prompt = [draw.randrange(vocab_size) for _ in range(context)]
        params = SamplingParams(temperature=0.0, max_tokens=4 * steps + 64, ignore_eos=True)
        core.add(f"r{i}", prompt, params)
    while len(core.scheduler.running) < batch or any(r.remaining > 1 for r in core.scheduler.running):
        core.step()
    capture_all(core)
    for _ in range(8):
        core.step()


def context_of(core: EngineCore) -> float:
    """Tokens of a running request, on average."""
    running = core.scheduler.running
    return sum(request.computed for request in running) / len(running)


def timed(core: EngineCore, steps: int, device: torch.device) -> float:
    """Seconds per step, the device's work included."""
    limits.synchronize(device)
    before = time.perf_counter()
    for _ in range(steps):
        core.step()
    limits.synchronize(device)
    return (time.perf_counter() - before) / steps


def profiled(core: EngineCore, steps: int, device: torch.device) -> dict[str, float]:
    """Idle time and kernels of a step; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            core.step()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return {"idle_us": idle(spans) / steps, "kernels": len(spans) / steps}


def idle(spans: Iterable[tuple[float, float]]) -> float:
    """The time between the first start and the last end in which nothing runs."""
    total, covered_to = 0.0, None
    for start, end in sorted(spans):
        if covered_to is not None and start > covered_to:
            total += start - covered_to
        covered_to = end if covered_to is None else max(covered_to, end)
    return total


def measure(
    args: argparse.Namespace, core: EngineCore, batch: int, device: torch.device, limit: limits.Limits
) -> dict[str, Any]:
    spec = read_spec(args.model)
    fill(core, batch, args.context, args.steps, spec.vocab_size)
    before, context = dict(core.snapshot().step_runs), context_of(core)
    step_s = min(timed(core, args.steps, device) for _ in range(2))
    runs = {
        run: count - before[run] for run, count in core.snapshot().step_runs.items() if count > before[run]
    }
    context = (context + context_of(core)) / 2
    least_s = limits.least_decode_s(spec, batch, context, limit)
    found = {
        "model": args.model,
        "batch": batch,
        "context": context,
        "step_ms": 1e3 * step_s,
        "tokens_per_s": batch / step_s,
        "share_of_bound": least_s / step_s,
        "runs": runs,
        "all_graphs": set(runs) == {StepRun.GRAPH.value},
        **profiled(core, min(args.steps, 20), device),
    }
    empty(core, batch)
    return found


def empty(core: EngineCore, batch: int) -> None:
    """Ends what `fill` began."""
    for i in range(batch):
        core.abort(f"r{i}")
    while core.has_work:
        core.step()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    limit = limits.measure(device, getattr(torch, args.dtype))
    results: list[dict[str, Any]] = []
    record = {"benchmark": "decode", "limits": limit._asdict(), "results": results}
    for deterministic in MODES[args.deterministic]:
        core = make_core(args, device, deterministic)
        for batch in args.batch:
            row = {"deterministic": deterministic, **measure(args, core, batch, device, limit)}
            plain = [each for each in results if each["batch"] == batch and not each["deterministic"]]
            note_cost([*plain, row], lambda each: each["step_ms"])
            results.append(row)
            print(row, flush=True)
            write(args, record)
        del core
        release(device)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_engine_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    return parse(parser, argv, DRY_RUN)


if __name__ == "__main__":
    main()
