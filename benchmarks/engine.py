"""Offline throughput of the whole engine, without HTTP: scheduler, blocks, kernels, sampler.

    python -m benchmarks.engine --model qwen3-0.6b --requests 256 --input 100-1024 --output 100-1024

The defaults on CUDA are nano-vllm's protocol (its README): 256 requests, input and output lengths uniform in
100 to 1024, seed 0, every output token generated. Weights are random: the same work, and noise for text.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import CONFIGS, random_transformer, read_spec
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, kv_row_bytes
from engine.core import EngineCore
from engine.exec.device import count_cores
from engine.exec.executor import LocalExecutor
from engine.exec.kv_store import KVStore
from engine.exec.rows import Rows
from engine.sample.sampler import Sampler
from engine.types import SamplingParams
from kernels import api


def make_core(args: argparse.Namespace, device: torch.device) -> EngineCore:
    """The real core and executor around a random model."""
    if device.type == "cpu":
        api.use_threads(args.threads or count_cores())
    spec = read_spec(args.model)
    dtype = getattr(torch, args.dtype)
    model = random_transformer(spec, dtype=dtype, device=device, max_model_len=args.max_model_len)
    kv_dtype = args.dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * kv_row_bytes(spec.head_dim, kv_dtype)
    num_blocks = int(args.kv_gib * 2**30) // (token_bytes * args.block_size)
    cache = CacheConfig(
        args.block_size, num_blocks, token_bytes * args.block_size, prefix_caching=True, dtype=kv_dtype
    )
    config = EngineConfig(
        model=ModelConfig(
            "", args.model, args.dtype, device.type, args.max_model_len, spec.vocab_size, (), seed=0
        ),
        cache=cache,
        scheduler=SchedulerConfig(args.max_num_seqs, args.max_num_batched_tokens, 10_000, args.steps_ahead),
    )
    store = KVStore(
        cache, num_layers=spec.num_layers, kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        device=device,
    )  # fmt: skip
    rows = Rows(args.max_num_seqs, -(-args.max_model_len // args.block_size) + 1, device)
    sampler = Sampler(args.max_num_seqs, spec.vocab_size, (), device)
    return EngineCore(config, LocalExecutor(model, store, rows, sampler))


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
    }


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    core = make_core(args, device)
    vocab_size = read_spec(args.model).vocab_size
    warm = [([1] * 64, SamplingParams(max_tokens=4, ignore_eos=True, temperature=args.temperature))] * 4
    run(core, warm, args.max_seconds)
    result = run(core, make_requests(args, vocab_size), args.max_seconds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result |= {
        "model": args.model,
        "dtype": args.dtype,
        "kv_dtype": args.kv_cache_dtype,
        "device": name,
        "backend": api.backend_name(device),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(CONFIGS), default="qwen3-0.6b" if cuda else "110m")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8"), default="auto")
    parser.add_argument("--requests", type=int, default=256 if cuda else 16)
    parser.add_argument("--input", type=_range, default=(100, 1024) if cuda else (256, 256), metavar="A-B")
    parser.add_argument("--output", type=_range, default=(100, 1024) if cuda else (128, 128), metavar="A-B")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-num-seqs", type=int, default=256 if cuda else 64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192 if cuda else 512)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=64 if cuda else 32)
    parser.add_argument("--kv-gib", type=float, default=60 if cuda else 1)
    parser.add_argument("--threads", type=int, help="default: one for each physical core")
    parser.add_argument("--steps-ahead", type=int, default=2 if cuda else 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=400)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


if __name__ == "__main__":
    main()
