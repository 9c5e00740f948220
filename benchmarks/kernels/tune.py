"""Tries launch shapes and writes the best ones to `kernels/tuning/`, for the GPU it runs on.

Each key (head size and memory's dtype, and for prefill whether rows are many) is tried on a few shapes; what
counts is the geometric mean of the times, against the default's. What does not compile or does not fit is
left out. An entry is written where something beats the default by more than MARGIN.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import machine
from benchmarks.kernels.attention import HEAD_DIM, Shape, calls, inputs_of
from benchmarks.kernels.timing import Deadline, Lab
from kernels.paged_attention import triton as attention
from kernels.paged_attention.triton_config import tuning_key
from kernels.tuning import tables

MARGIN = 0.02
Fields = dict[str, Any]


def tune(lab: Lab, deadline: Deadline) -> dict[str, Any]:
    """The table of this GPU: measured entries over those that are there already."""
    name = "dry run" if lab.dry else torch.cuda.get_device_name()
    table = {"decode": {}, "prefill": {}, **tables.read_table(name)}
    table |= {"gpu": name, "measured": machine.describe(lab.device)}
    for kernel, key, shapes in _jobs(lab):
        if deadline.passed():
            print("tuning: out of time; the rest keeps its defaults")
            break
        found = _best(lab, kernel, shapes, deadline)
        print(f"tuned {kernel} {key}: {found or 'the default'}", flush=True)
        table[kernel].pop(key, None)
        if found:
            table[kernel][key] = found
    return table


def write(table: dict[str, Any]) -> None:
    """Puts the table where the launchers look."""
    path = tables.FOLDER / tables.file_name(table["gpu"])
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {path}")


def _jobs(lab: Lab) -> Iterator[tuple[str, str, list[Shape]]]:
    if lab.dry:
        yield "decode", tuning_key(HEAD_DIM, torch.bfloat16), [Shape(16, 2, 20, block_size=16)]
        return
    for memory, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        key = tuning_key(HEAD_DIM, dtype)
        sizes = ((1, 1024), (1, 8192), (32, 1024), (32, 4096), (128, 2048))
        yield "decode", key, [Shape(32, b, c, memory=memory) for b, c in sizes]
        chunks = [Shape(32, 1, 4096 + prefix, queries=4096, memory=memory) for prefix in (0, 8192)]
        yield "prefill", f"{key} long", chunks
        yield "prefill", f"{key} short", [Shape(32, 16, 1024, queries=8, memory=memory)]


def _candidates(lab: Lab, kernel: str) -> Iterator[Fields]:
    """The default first."""
    yield {}
    if lab.dry:
        yield {"tile": 16}
    elif kernel == "decode":
        for tile, warps, stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4)):
            yield {"tile": tile, "warps": warps, "stages": stages}
        for programs, tokens in itertools.product((2, 4, 16), (128, 256, 512)):
            yield {"programs_per_sm": programs, "min_chunk_tokens": tokens}
        yield {"last_merges": False}
    else:
        for rows, tile, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
            yield {"rows": rows, "tile": tile, "warps": warps, "stages": stages}


def _best(lab: Lab, kernel: str, shapes: list[Shape], deadline: Deadline) -> Fields:
    """The fields of the fastest candidate; empty for the default."""
    inputs = [inputs_of(lab, shape, lab.layers_for(shape.kv_bytes)) for shape in shapes]
    chooser = f"{kernel}_config"
    stock = getattr(attention, chooser)
    times: list[tuple[float, Fields]] = []
    for fields in _candidates(lab, kernel):
        if times and deadline.passed():
            break

        def chosen(*args: Any, fields: Fields = fields) -> Any:
            config = dataclasses.replace(stock(*args), **fields)
            if "programs_per_sm" in fields:
                share = fields["programs_per_sm"] / stock(*args).programs_per_sm
                config = dataclasses.replace(config, target_programs=round(config.target_programs * share))
            return config

        setattr(attention, chooser, chosen)
        try:
            times.append((_mean_us(lab, shapes, inputs), fields))
        except Exception as error:  # too much shared memory, or whatever else the compiler says
            print(f"  {kernel} {fields}: {type(error).__name__}")
        finally:
            setattr(attention, chooser, stock)
    fastest = min(times, key=lambda entry: entry[0])
    return fastest[1] if fastest[0] < times[0][0] * (1 - MARGIN) else {}


def _mean_us(lab: Lab, shapes: list[Shape], inputs: list[Any]) -> float:
    times = []
    for shape, (memory, batch, q_THD) in zip(shapes, inputs, strict=True):
        batch.plans.clear()
        times.append(lab.time_us(calls(shape, q_THD, memory, batch), before=batch.plans.clear, repeats=5))
    return math.exp(sum(map(math.log, times)) / len(times))
