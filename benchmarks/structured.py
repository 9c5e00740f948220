"""What a grammar costs: those under it, and those beside it while a hard one is compiled.

    python -m benchmarks.structured [--models demo 110m] [--streams 16] [--rounds 7] [--json FILE]

Overhead: each model decodes N streams, free and under a simple schema in turns. Every round is the same, so
what is compared is the mean over all steps of the least time that a step of N tokens took in any round, by
the clock and of the stepping thread alone: other work on the machine only adds to it. The ratios of the
medians are given too. The schema never ends, so that all streams run to the last step. `demo` is the built-in
model, `110m` has random weights and a vocabulary of 32,000.

Delay: one stream decodes in an engine process while hostile grammars, each a new one, are compiled there.
What is compared is the longest time between two tokens of a round, with and without.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.compare.checkpoints import checkpoint
from engine import builtin, grammar
from engine.build import build
from engine.client import ProcessClient
from engine.config import EngineOptions
from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.text.tokenizer import Tokenizer
from engine.types import SamplingParams

TOKENS = 96
ROUND_S = 1.0
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["happy", "sad", "neither"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
SIMPLE = grammar.json_schema({"type": "array", "items": ITEM, "minItems": 1000})


def hostile(number: int) -> Grammar:
    """One of five kinds, about as large as is taken, never the same twice."""
    mark = f"{number:05}"
    names = [f"p{mark}_{i}" for i in range(999)]
    kind = number % 5
    if kind == 0:
        return grammar.json_schema(
            {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        )
    if kind == 1:
        return grammar.json_schema({"enum": [f"{mark} value {i}" for i in range(9000)]})
    if kind == 2:
        one = [{"properties": {name: {"type": "string"}}, "required": [name]} for name in names[:6]]
        return grammar.json_schema({"allOf": [{"type": "object", "anyOf": one} for _ in range(8)]})
    if kind == 3:
        rules = "\n".join(f'r{i}: "{mark}a{i}"' for i in range(1000))
        return grammar.lark("start: " + " | ".join(f"r{i}" for i in range(1000)) + "\n" + rules)
    return grammar.regex("|".join(f"{mark}w{i}x{i * 31 % 997}" for i in range(2000)))


def steps_ms(core: EngineCore, wanted: Grammar | None, streams: int, name: str) -> list[tuple[float, float]]:
    """(by the clock, of this thread) for each step in which every stream decodes one token."""
    for i in range(streams):
        params = SamplingParams(max_tokens=TOKENS, seed=i, ignore_eos=True, grammar=wanted)
        core.add(f"{name}-{i}", [5, 6, 7, i + 8], params)
    taken = []
    while core.has_work:
        clock_s, thread_s = time.perf_counter(), time.thread_time()
        outputs = core.step()
        if len(outputs) == streams:
            taken.append(((time.perf_counter() - clock_s) * 1e3, (time.thread_time() - thread_s) * 1e3))
    return taken


def overhead(model: Path, streams: int, rounds: int) -> dict[str, Any]:
    core, _ = build(EngineOptions(model=str(model), max_num_seqs=streams, max_model_len=512))
    steps_ms(core, None, streams, "warm")
    steps_ms(core, SIMPLE, streams, "warm")
    free, held = [], []
    for number in range(rounds):
        free.append(steps_ms(core, None, streams, f"free-{number}"))
        held.append(steps_ms(core, SIMPLE, streams, f"held-{number}"))
    free_RS2, held_RS2 = np.array(free), np.array(held)
    free_R, held_R = (np.median(times[:, :, 0], axis=1) for times in (free_RS2, held_RS2))
    least_free_2, least_held_2 = (times.min(axis=0).mean(axis=0) for times in (free_RS2, held_RS2))
    return {
        "streams": streams,
        **{
            f"{what}_step_ms": dict(
                zip(("clock", "thread"), (round(float(ms), 3) for ms in least_2), strict=True)
            )
            for what, least_2 in (("free", least_free_2), ("held", least_held_2))
        },
        "overhead_ms": round(float(least_held_2[0] - least_free_2[0]), 3),
        "overhead_percent": round(float(least_held_2[0] / least_free_2[0] - 1) * 100, 2),
        "medians_percent": [round(float(ratio - 1) * 100, 1) for ratio in held_R / free_R],
    }


async def longest_gap_ms(client: ProcessClient, name: str, *, compiling: int | None) -> tuple[float, float]:
    """(the longest, the median) time between two tokens of a stream, in milliseconds."""

    async def compile_all() -> None:
        number = compiling or 0
        while True:
            with contextlib.suppress(InvalidRequest):
                await client.compile_grammar(hostile(number))
            number += 1

    arrived = []
    task = None if compiling is None else asyncio.create_task(compile_all())
    async for event in client.submit(name, [5, 6, 7], SamplingParams(max_tokens=2000, ignore_eos=True)):
        arrived += [time.perf_counter()] * bool(event.token_ids)
        if arrived[-1] - arrived[0] > ROUND_S:
            break
    client.abort(name)
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    gaps = [b - a for a, b in itertools.pairwise(arrived)]
    return max(gaps) * 1e3, statistics.median(gaps) * 1e3


async def delay(rounds: int) -> dict[str, Any]:
    model = str(builtin.path())
    client = ProcessClient(EngineOptions(model=model), Tokenizer.from_dir(model))
    await client.start()
    try:
        await client.compile_grammar(SIMPLE)
        alone, beside = [], []
        for number in range(rounds):
            alone.append(await longest_gap_ms(client, f"alone-{number}", compiling=None))
            beside.append(await longest_gap_ms(client, f"beside-{number}", compiling=number * 1000))
    finally:
        await client.stop()
    longest_alone, longest_beside = ([gap for gap, _ in found] for found in (alone, beside))
    return {
        "alone_longest_ms": statistics.median(longest_alone),
        "beside_longest_ms": statistics.median(longest_beside),
        "beside_longest_of_all_ms": max(longest_beside),
        "alone_median_ms": statistics.median(gap for _, gap in alone),
        "beside_median_ms": statistics.median(gap for _, gap in beside),
        "delay_ms": statistics.median(longest_beside) - statistics.median(longest_alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("demo", "110m"), default=["demo"])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    found = {
        **{
            f"overhead {name}": overhead(
                builtin.path() if name == "demo" else checkpoint(name), options.streams, options.rounds
            )
            for name in options.models
        },
        "delay": asyncio.run(delay(options.rounds)),
    }
    for name, figures in found.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:28} {value:.3f}" if isinstance(value, float) else f"  {key:28} {value}")
    if options.json:
        record = {"benchmark": "structured", "machine": machine.describe(), "results": found}
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
