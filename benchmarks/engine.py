"""Offline throughput of the whole engine, without HTTP: scheduler, blocks, kernels, sampler.

    python -m benchmarks.engine --model qwen3-0.6b --requests 256 --input 100-1024 --output 100-1024

The defaults on CUDA are nano-vllm's protocol (its README): 256 requests, input and output lengths uniform in
100 to 1024, seed 0, every output token generated. Weights are random: the same work, and noise for text.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine, transformers_batching
from benchmarks.models import CONFIGS, random_transformer, read_spec
from engine.build import assemble
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, kv_row_bytes
from engine.core import EngineCore
from engine.exec.device import count_cores
from engine.exec.graphs import CudaGraphs
from engine.types import SamplingParams
from kernels import api

# For a dry run.
TINY: Mapping[str, Any] = {
    "model": "tiny", "device": "cpu", "kv_gib": 0.05, "max_num_seqs": 4, "max_model_len": 256,
    "block_size": 32, "max_num_batched_tokens": 64, "threads": 1, "steps_ahead": 2,
}  # fmt: skip
MODES = {"off": (False,), "on": (True,), "both": (False, True)}
DRY_RUN: Mapping[str, Any] = {**TINY, "requests": 5, "input": (5, 40), "output": (3, 9)}


def make_core(args: argparse.Namespace, device: torch.device, deterministic: bool = False) -> EngineCore:
    """The real core and executor around a random model."""
    if device.type == "cpu":
        api.use_threads(args.threads or count_cores())
    spec = read_spec(args.model)
    dtype = getattr(torch, args.dtype)
    model = random_transformer(
        spec, dtype=dtype, device=device, max_model_len=args.max_model_len, deterministic=deterministic
    )
    kv_dtype = args.dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * kv_row_bytes(spec.head_dim, kv_dtype)
    num_blocks = int(args.kv_gib * 2**30) // (token_bytes * args.block_size)
    cache = CacheConfig(
        args.block_size, num_blocks, token_bytes * args.block_size, prefix_caching=True, dtype=kv_dtype
    )
    config = EngineConfig(
        model=ModelConfig(
            args.model,
            args.dtype,
            device.type,
            args.max_model_len,
            spec.vocab_size,
            (),
            seed=0,
            deterministic=deterministic,
        ),
        cache=cache,
        scheduler=SchedulerConfig(args.max_num_seqs, args.max_num_batched_tokens, 10_000, args.steps_ahead),
        cuda_graphs=args.cuda_graphs == "auto" and device.type == "cuda",
    )
    maker = CudaGraphs() if config.cuda_graphs else Relaunched() if args.dry_run else None
    return EngineCore(config, assemble(config, model, maker))


class Relaunched(NamedTuple):
    """In place of a graph, and of what makes one, in a dry run: launches again."""

    replay: Callable[[], None] = lambda: None

    def capture(self, launch: Callable[[], None]) -> Relaunched:
        return Relaunched(launch)


def capture_all(core: EngineCore) -> None:
    """Captures every graph that is known to be needed, as an engine does that has nothing to do."""
    while core.prepare():
        pass


def make_requests(args: argparse.Namespace, vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    draw = random.Random(args.seed)
    shared = [draw.randrange(vocab_size) for _ in range(args.shared_prefix)]
    requests = []
    for i in range(args.requests):
        prompt = shared + [draw.randrange(vocab_size) for _ in range(draw.randint(*args.input))]
        params = SamplingParams(
            temperature=args.temperature, max_tokens=draw.randint(*args.output), ignore_eos=True, seed=i
        )
        requests.append((prompt, params))
    return requests


def run(
    core: EngineCore, requests: list[tuple[list[int], SamplingParams]], deadline_s: float
) -> dict[str, Any]:
    """Submits everything at once and steps until nothing is left."""
    started = time.perf_counter()
    for i, (prompt, params) in enumerate(requests):
        core.add(f"r{i}", prompt, params)
    tokens = steps = 0
    step_s: list[float] = []
    while core.has_work:
        before = time.perf_counter()
        tokens += sum(output.token_id is not None for output in core.step())
        step_s.append(time.perf_counter() - before)
        steps += 1
        if before - started > deadline_s:
            raise SystemExit(f"not done within {deadline_s} s: {tokens} tokens so far")
    seconds = time.perf_counter() - started
    snapshot = core.snapshot()
    return {
        "seconds": seconds,
        "prompt_tokens": sum(len(prompt) for prompt, _ in requests),
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / seconds,
        "steps": steps,
        "median_step_ms": 1e3 * statistics.median(step_s),
        "preemptions": snapshot.preemptions,
        "prefix_hit_tokens": snapshot.prefix_hit_tokens,
        "step_runs": {run: count for run, count in snapshot.step_runs.items() if count},
    }


def release(device: torch.device) -> None:
    """Gives back the memory of cores that are not used any more: they refer to themselves in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    requests = make_requests(args, read_spec(args.model).vocab_size)
    record: dict[str, Any] = {"benchmark": "engine", "results": []}
    for deterministic in MODES[args.deterministic]:
        record["results"].append(measure(args, requests, device, deterministic))
        release(device)
        print(json.dumps(record["results"][-1], indent=2), flush=True)
        write(args, record)
    note_cost(record["results"], lambda row: row["seconds"])
    if args.peer:
        record["transformers"] = transformers_batching.run(args, requests, device)
        print(json.dumps(record["transformers"], indent=2))
    write(args, record)


def measure(
    args: argparse.Namespace,
    requests: list[tuple[list[int], SamplingParams]],
    device: torch.device,
    deterministic: bool,
) -> dict[str, Any]:
    core = make_core(args, device, deterministic)
    warm = [([1] * 64, SamplingParams(max_tokens=4, ignore_eos=True, temperature=args.temperature))] * 4
    run(core, warm, args.max_seconds)
    capture_all(core)
    result = {"model": args.model, "dtype": args.dtype, "kv_dtype": args.kv_cache_dtype}
    result |= {"backend": api.backend_name(device), "deterministic": deterministic}
    return {**result, **run(core, requests, args.max_seconds)}


def note_cost(results: list[dict[str, Any]], took: Callable[[dict[str, Any]], float]) -> None:
    """Adds what deterministic mode costs, a share of the time, to its row, where there is one beside it."""
    if [row["deterministic"] for row in results] == [False, True]:
        results[1]["deterministic_cost"] = took(results[1]) / took(results[0]) - 1


def write(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Writes what was found, with what it was found on and how it was asked."""
    asked = {name: value for name, value in vars(args).items() if name != "json"}
    if args.json:
        record = {**record, "machine": machine.describe(args.device), "settings": asked}
        machine.save(args.json, record)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = add_engine_arguments(parser)
    parser.add_argument("--requests", type=int, default=256 if cuda else 16)
    parser.add_argument("--input", type=_range, default=(100, 1024) if cuda else (256, 256), metavar="A-B")
    parser.add_argument("--output", type=_range, default=(100, 1024) if cuda else (128, 128), metavar="A-B")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=400)
    parser.add_argument("--peer", action="store_true", help="then transformers' continuous batching as well")
    return parse(parser, argv, DRY_RUN)


def add_engine_arguments(parser: argparse.ArgumentParser) -> bool:
    """Adds what decides the model and the engine; returns whether there is a GPU, for more defaults."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", choices=list(CONFIGS), default="qwen3-0.6b" if cuda else "110m")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8"), default="auto")
    parser.add_argument("--deterministic", choices=list(MODES), default="off", help="both: and what it costs")
    parser.add_argument("--cuda-graphs", choices=("auto", "off"), default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=256 if cuda else 64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192 if cuda else 512)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=64 if cuda else 32)
    parser.add_argument("--kv-gib", type=float, default=50 if cuda else 1)
    parser.add_argument("--threads", type=int, help="default: one for each physical core")
    parser.add_argument("--steps-ahead", type=int, default=2 if cuda else 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU: does it run at all?")
    return cuda


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, dry_run: Mapping[str, Any]
) -> argparse.Namespace:
    """Parses, with other defaults for a dry run."""
    if parser.parse_args(argv).dry_run:
        parser.set_defaults(**dry_run)
    return parser.parse_args(argv)


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


if __name__ == "__main__":
    main()
