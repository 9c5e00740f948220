"""The engine's own cost per step: schedule, update and outputs, with an executor that does nothing.

What is measured is what the device must wait for, or hide: a step of R running requests that each decode
one token. Prompts are computed before the clock starts. A snapshot is taken after each step; the server takes
five a second.

With --watch somebody looks at the pool: blocks that change are remembered, and after every 40 steps (five
times a second where a step takes 5 ms) they are sent, with what each request does. `watched %` is the time
that this takes the engine, of a second with five frames.

With --long-prompt a prompt of so many tokens comes beside 16 running requests, which decode on: first it is
computed, then the same one is found in the cache. What is told is the longest step of each, admission,
publication and release included, by the clock and by the processor time of the thread.

    python -m benchmarks.step_overhead [--watch] [--json FILE]
    python -m benchmarks.step_overhead --long-prompt 432000 [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from array import array
from typing import NamedTuple

from benchmarks import machine
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.plan import StepPlan, StepResult, TokenMasks
from engine.process import frames
from engine.types import SamplingParams

BLOCK_SIZE = 64
PROMPT_TOKENS = 512
LONG_BLOCK_SIZE = 32
GOALS_MS = {1: 0.2, 16: 0.5, 256: 3.0}
WARM_UP_STEPS = 20
FRAMES_PER_S = 5
STEPS_PER_FRAME = 40


class _Done(NamedTuple):
    token_ids: list[int]

    def result(self) -> StepResult:
        return StepResult(self.token_ids)


class NullExecutor:
    """Every sequence that samples draws token 7."""

    def forward(self, plan: StepPlan) -> None:
        self._drawn = [7] * sum(sequence.samples for sequence in plan.sequences)

    def prepare(self) -> bool:
        return False

    def sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> _Done:
        return _Done(self._drawn)


class _Figures(NamedTuple):
    running: int
    steps_ahead: int
    median_ms: float
    p99_ms: float
    snapshot_ms: float
    goal_ms: float | None
    frame_ms: float | None = None
    full_frame_ms: float | None = None

    @property
    def watched_percent(self) -> float | None:
        return None if self.frame_ms is None else self.frame_ms * FRAMES_PER_S / 10


def _make_core(running: int, steps: int, steps_ahead: int) -> EngineCore:
    blocks = running * -(-(PROMPT_TOKENS + steps + WARM_UP_STEPS + 8) // BLOCK_SIZE) + 1 + running
    config = EngineConfig(
        model=ModelConfig("null", "float32", "cpu", 1 << 20, 1000, (1,), seed=0),
        cache=CacheConfig(BLOCK_SIZE, blocks, 1, prefix_caching=True, dtype="float32"),
        scheduler=SchedulerConfig(running, 1 << 20, running, steps_ahead),
    )
    core = EngineCore(config, NullExecutor())
    params = SamplingParams(max_tokens=steps + WARM_UP_STEPS + 4, stop_token_ids=(3,))
    for i in range(running):
        core.add(f"request-{i}", [i + 2, *range(2, PROMPT_TOKENS + 1)], params)
    return core


def _send(core: EngineCore, *, full: bool) -> float:
    """Milliseconds to make one frame of the pool as bytes."""
    before = time.perf_counter()
    frames.pack(frames.Pool(core.frame(full)))
    return (time.perf_counter() - before) * 1e3


def measure(running: int, steps: int, steps_ahead: int, *, watch: bool = False) -> _Figures:
    """Times `steps` steps of `running` decoding requests."""
    core = _make_core(running, steps, steps_ahead)
    for _ in range(WARM_UP_STEPS):
        core.step()
    assert len(core.scheduler.running) == running
    step_s, snapshot_s, frame_ms = [], [], []
    core.watch(watch)
    full_frame_ms = _send(core, full=True) if watch else None
    gc.collect()
    gc.freeze()
    for number in range(steps):
        before = time.perf_counter()
        outputs = core.step()
        between = time.perf_counter()
        core.snapshot()
        snapshot_s.append(time.perf_counter() - between)
        step_s.append(between - before)
        assert len(outputs) == running
        if watch and number % STEPS_PER_FRAME == STEPS_PER_FRAME - 1:
            frame_ms.append(_send(core, full=False))
    gc.unfreeze()
    return _Figures(
        running,
        steps_ahead,
        statistics.median(step_s) * 1e3,
        statistics.quantiles(step_s, n=100)[-1] * 1e3,
        statistics.median(snapshot_s) * 1e3,
        GOALS_MS.get(running),
        statistics.median(frame_ms) if frame_ms else None,
        full_frame_ms,
    )


def longest_steps(tokens: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(clock, processor) milliseconds of the longest step, for each round, cold and hit.

    The time to take the request in counts to its first step.
    """
    running = 16
    blocks = 2 * tokens // LONG_BLOCK_SIZE + 1000
    config = EngineConfig(
        model=ModelConfig("null", "float32", "cpu", 1 << 30, 5000, (1,), seed=0),
        cache=CacheConfig(LONG_BLOCK_SIZE, blocks, 1, prefix_caching=True, dtype="float32"),
        scheduler=SchedulerConfig(running + 1, 8192, 4),
    )
    core = EngineCore(config, NullExecutor())
    for i in range(running):
        core.add(f"beside-{i}", [i + 2], SamplingParams(max_tokens=rounds * tokens // 1000, ignore_eos=True))
    core.step()
    gc.collect()
    gc.freeze()  # as the engine process does
    found: dict[str, list[tuple[float, float]]] = {"cold": [], "hit": []}
    for number in range(rounds):
        prompt = array("I", random.Random(number).choices(range(2, 5000), k=tokens))
        for name, longest in found.items():
            clock_s, thread_s = time.perf_counter(), time.thread_time()
            core.add(name, prompt, SamplingParams(max_tokens=2, ignore_eos=True))
            taken, ended = [], False
            while not ended:
                outputs = core.step()
                taken.append((time.perf_counter() - clock_s, time.thread_time() - thread_s))
                clock_s, thread_s = time.perf_counter(), time.thread_time()
                ended = any(output.request_id == name and output.finish_reason for output in outputs)
            longest.append((1e3 * max(c for c, _ in taken), 1e3 * max(t for _, t in taken)))
    gc.unfreeze()
    return found


def _tell_longest(tokens: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    found = longest_steps(tokens, rounds)
    for name, longest in found.items():
        clock, thread = zip(*longest, strict=True)
        print(
            f"{name:>5}: longest step {statistics.median(clock):.1f} ms by the clock ({min(clock):.1f} to "
            f"{max(clock):.1f}), {statistics.median(thread):.1f} ms of processor time"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--running", type=int, nargs="*", default=list(GOALS_MS), help="decoding requests")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--watch", action="store_true", help="somebody looks at the pool")
    parser.add_argument("--long-prompt", type=int, metavar="TOKENS", help="one beside 16 requests")
    parser.add_argument("--rounds", type=int, default=5, help="with --long-prompt")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.long_prompt:
        longest = _tell_longest(options.long_prompt, options.rounds)
        settings = {"block_size": LONG_BLOCK_SIZE, "prompt_tokens": options.long_prompt, "beside": 16}
        _write(options.json, settings, {"longest_step_ms": longest})
        return
    figures = [
        measure(n, options.steps, ahead, watch=options.watch) for ahead in (1, 2) for n in options.running
    ]
    print(
        f"{'running':>8} {'ahead':>6} {'median ms':>10} {'p99 ms':>8} {'snapshot ms':>12} {'goal ms':>8}",
        end="",
    )
    print(f" {'frame ms':>9} {'full ms':>8} {'watched %':>10}" if options.watch else "")
    for f in figures:
        print(
            f"{f.running:>8} {f.steps_ahead:>6} {f.median_ms:>10.3f} {f.p99_ms:>8.3f} "
            f"{f.snapshot_ms:>12.4f} {f.goal_ms if f.goal_ms is not None else '-':>8}",
            end="",
        )
        print(f" {f.frame_ms:>9.3f} {f.full_frame_ms:>8.3f} {f.watched_percent:>10.3f}" if f.frame_ms else "")
    settings = {"block_size": BLOCK_SIZE, "prompt_tokens": PROMPT_TOKENS, "steps": options.steps}
    _write(options.json, settings, [f._asdict() for f in figures])


def _write(path: str | None, settings: dict[str, int], results: object) -> None:
    if path is None:
        return
    record = {
        "benchmark": "step_overhead",
        "machine": machine.describe(),
        "settings": settings,
        "results": results,
    }
    with open(path, "w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
