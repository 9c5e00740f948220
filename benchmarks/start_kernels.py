"""Which GPU kernels a start compiles, and how long that takes; on a CPU, without a GPU.

    python -m benchmarks.start_kernels [--model qwen3-0.6b] [--arch 90] [--threads 2] [--json FILE]

The engine's own warm-up and first requests, on one layer of the model, with the Triton kernels on CPU tensors
and an empty cache of compiled kernels. Everything happens but the launches: where one would be, the kernel is
waited for. `--threads 0` is a start without a rehearsal: each kernel is compiled where it is first launched.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks import machine
from benchmarks.engine import Relaunched
from benchmarks.gpu_compile import pretend
from benchmarks.models import CONFIGS, assemble, random_weights, read_spec
from engine.build import assemble as assemble_executor
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.exec.warm_up import warm_up
from engine.types import SamplingParams
from kernels import api

# What first requests may be like: short and long, greedy and sampled, with filters and without.
FIRST = [
    ([5, 6], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0)),
    ([7] * 128, SamplingParams(max_tokens=3, ignore_eos=True)),
    ([8] * 700, SamplingParams(top_p=0.9, top_k=40, max_tokens=3, ignore_eos=True)),
]


def use_triton(arch: int) -> None:
    """CPU tensors go to the Triton kernels, which are compiled for a GPU that is not there, and not launched.

    What a kernel would have computed is zero: tokens must be tokens.
    """
    pretend(arch)
    vars(api)["_backend"] = lambda op, _: importlib.import_module(f"kernels.{op}.triton")
    for op in ("rotate_and_write", "paged_attention"):
        setattr(api, op, getattr(importlib.import_module(f"kernels.{op}.triton"), op))
    vars(api)["native_decoder"] = lambda *_: None
    # cuBLAS's part; nobody looks at its numbers.
    vars(api)["pack_linear"] = lambda weight_OI, *_: api.PackedLinear(
        "plain", weight_OI, None, *weight_OI.shape
    )
    vars(api)["linear"] = lambda x_TI, packed: x_TI.new_zeros(len(x_TI), packed.outputs)
    stock_run = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = stock_run(self, *args, warmup=True, **kwargs)
        # In a rehearsal nobody waits; where it would be launched everybody does.
        return kernel if warmup or not hasattr(kernel, "result") else kernel.result()

    JITFunction.run = run
    vars(torch)["empty"] = torch.zeros


class Launched(Relaunched):
    """In place of what makes graphs: launches once when it captures."""

    def capture(self, launch: Callable[[], None]) -> Relaunched:
        launch()
        return super().capture(launch)


def make_core(model: str) -> tuple[EngineCore, EngineConfig]:
    """An engine as `quire serve` sets it up on a GPU, around two layers."""
    spec = read_spec(model)
    # Two: the last one attends for the tokens that are drawn from alone, as a decode does.
    spec = dataclasses.replace(spec, num_layers=2, windows=spec.windows[:2], ropes=spec.ropes[:2])
    weights = random_weights(spec, dtype=torch.bfloat16, device=torch.device("cpu"))
    config = EngineConfig(
        model=ModelConfig(model, "bfloat16", "cuda", 4096, spec.vocab_size, (), seed=0),
        cache=CacheConfig(64, 64, 1, True, "bfloat16"),
        scheduler=SchedulerConfig(256, 8192, 1000, steps_ahead=2),
        cuda_graphs=True,
    )
    return EngineCore(config, assemble_executor(config, assemble(spec, weights, 4096), Launched())), config


class Compilations:
    """What was compiled, and when it was asked for.

    Attributes:
        asked: kernels by the phase of the start in which they were first needed.
        rows: what each compilation took, and how much of it in Python, before the compiler's passes.
    """

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {}
        self.rows: list[dict[str, Any]] = []
        self._phase = ""
        knobs.runtime.jit_cache_hook = self._note_asked
        knobs.compilation.listener = self._note_compiled

    def begin(self, phase: str) -> None:
        self._phase = phase
        self.asked[phase] = []

    def _note_asked(self, *, fn: Any, **_: Any) -> bool:
        self.asked[self._phase].append(fn.name)
        return False

    def _note_compiled(self, *, src: Any, times: Any, **_: Any) -> None:
        python_s = times.ir_initialization / 1e6
        stages = {name: microseconds / 1e6 for name, microseconds in times.lowering_stages}
        row = {"kernel": src.name, "seconds": python_s + sum(stages.values()), "python_s": python_s}
        self.rows.append({**row, "stages": stages})


def phases(core: EngineCore, config: EngineConfig, threads: int) -> Iterator[tuple[str, Any]]:
    """Of a start, in order: a name, and what is done."""
    executor: Any = core._executor
    rehearse = executor.rehearse
    executor.rehearse = lambda plans, _: rehearse(plans, threads) if threads else None
    yield "warm-up", lambda: warm_up(executor, config)
    for i, (prompt, params) in enumerate(FIRST):
        yield f"request {i}", lambda i=i, prompt=prompt, params=params: answer(core, str(i), prompt, params)
    yield "graphs", lambda: [None for _ in iter(core.prepare, False)]


def answer(core: EngineCore, name: str, prompt: list[int], params: SamplingParams) -> None:
    core.add(name, prompt, params)
    while core.has_work:
        core.step()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        use_triton(args.arch)
        core, config = make_core(args.model)
        compiled = Compilations()
        took_s: dict[str, float] = {}
        for name, do in phases(core, config, args.threads):
            compiled.begin(name)
            began_s = time.perf_counter()
            do()
            took_s[name] = time.perf_counter() - began_s
    report(args, compiled, took_s)


def report(args: argparse.Namespace, compiled: Compilations, took_s: dict[str, float]) -> None:
    for row in compiled.rows:
        print(f"{row['kernel']:20} {row['seconds']:6.2f} s, in Python {row['python_s']:.2f} s")
    for name, seconds in took_s.items():
        print(f"{name:12} {seconds:6.2f} s, needs {len(compiled.asked[name])} kernels first")
    if args.json:
        asked = {name: value for name, value in vars(args).items() if name != "json"}
        record = {"benchmark": "start_kernels", "machine": machine.describe(), "settings": asked}
        results = {"took_s": took_s, "asked": compiled.asked, "compiled": compiled.rows}
        machine.save(args.json, {**record, "results": results})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(CONFIGS), default="qwen3-0.6b")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compile; 0: no rehearsal")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
