"""Times the CPU kernels beside what torch offers for the same work, in one run.

    python -m benchmarks.cpu_kernels [--only attention,prefill,write,linear,small,sample] [--json FILE]

Every figure is the least and the median of interleaved rounds, so that a disturbance hits all sides. Weights
and KV memory are taken in turn from more copies than the caches hold, as a model's layers are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe
from kernels import api
from kernels.native import library as native

Run = Callable[[], object]
HEADS, KV_HEADS, DIM = 16, 8, 128  # those of Qwen3-0.6B
ROUNDS = 4
CACHE_BYTES = 100e6  # three times the L3 of the machine this was written on
BF16 = torch.bfloat16


def measure(runs: dict[str, Run], seconds: float) -> dict[str, dict[str, float]]:
    """Gives the runs turns for some seconds each; returns ms per call, least and median.

    A turn is some calls long: torch's idle OpenMP threads spin for a while and would slow down the next.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            end = time.perf_counter() + seconds / ROUNDS
            calls = 0
            while time.perf_counter() < end or calls < 2:
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
                calls += 1
    return {name: {"min": min(t), "median": statistics.median(t)} for name, t in times.items()}


def in_turn(runs: list[Run]) -> Run:
    """One callable that makes the next call of a cycle each time."""
    state = iter(range(10**12))
    return lambda: runs[next(state) % len(runs)]()


def batch(sequences: int, context: int, query: int, block: int) -> tuple[api.AttentionBatch, int]:
    blocks = -(-context // block)
    table_SB = (torch.randperm(sequences * blocks) + 1).view(sequences, blocks).int()
    start_S1 = torch.arange(sequences + 1, dtype=torch.int32) * query
    length_S = torch.full((sequences,), context, dtype=torch.int32)
    decodes = sequences if query == 1 else 0
    return api.AttentionBatch(table_SB, start_S1, length_S, decodes, query, context), sequences * blocks + 1


def attention_run(
    dtype: torch.dtype,
    sequences: int,
    context: int,
    query: int,
    block: int,
    level: str | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Run:
    plan, blocks = batch(sequences, context, query, block)
    q_THD = torch.randn(sequences * query, HEADS, DIM).to(dtype)
    kv_dtype = kv_dtype or dtype
    kv = torch.zeros(blocks, 2, KV_HEADS, block, api.kv_width(DIM, kv_dtype), dtype=kv_dtype)
    with native.using(level):
        for number in range(blocks):
            k_TGD, v_TGD = torch.randn(2, block, KV_HEADS, DIM).to(dtype)
            api.write_kv(k_TGD, v_TGD, kv, torch.arange(block) + number * block)

    def run() -> None:
        with native.using(level):
            api.paged_attention(q_THD, kv, plan, scale=DIM**-0.5)

    return run


def gather_run(dtype: torch.dtype, sequences: int, context: int, block: int) -> Run:
    """torch's way to decode: gather the blocks into a buffer, then SDPA with a group's queries as rows."""
    plan, blocks = batch(sequences, context, 1, block)
    kv = torch.randn(blocks, 2 * KV_HEADS * block * DIM).to(dtype)
    ids = plan.page_table_SB.flatten().long()
    q = torch.randn(sequences, KV_HEADS, HEADS // KV_HEADS, DIM).to(dtype)
    buffer = torch.empty(len(ids), kv.shape[1], dtype=dtype)

    def run() -> None:
        torch.index_select(kv, 0, ids, out=buffer)
        k, v = buffer.view(sequences, -1, 2, KV_HEADS, block, DIM).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        F.scaled_dot_product_attention(q, k, v)

    return run


def attention() -> Iterator[tuple[str, dict[str, Run]]]:
    for dtype in (BF16, torch.float32, torch.float16):
        runs: dict[str, Run] = {f"block {p}": attention_run(dtype, 16, 1024, 1, p) for p in (16, 32, 64, 128)}
        runs |= {level: attention_run(dtype, 16, 1024, 1, 32, level) for level in native.levels()[1:-1]}
        runs["torch gather + SDPA"] = gather_run(dtype, 16, 1024, 32)
        yield f"decode attention 16 x 1024 {dtype}", runs
    for sequences, context in ((16, 1024), (8, 2048), (4, 8192)):
        yield f"decode attention {sequences} x {context} by KV type", kv_types(sequences, context, 1)
    runs = {f"block {p}": attention_run(BF16, 1, 8192, 1, p) for p in (16, 32, 64, 128)}
    yield "decode attention 1 x 8192 bf16", runs


def kv_types(sequences: int, context: int, query: int) -> dict[str, Run]:
    """bf16 queries on memory in bf16 and in int8."""
    return {
        "bf16": attention_run(BF16, sequences, context, query, 32),
        "int8": attention_run(BF16, sequences, context, query, 32, kv_dtype=torch.int8),
    }


def prefill() -> Iterator[tuple[str, dict[str, Run]]]:
    for dtype in (BF16, torch.float32, torch.float16):
        q, k, v = (torch.randn(1, HEADS, 2048, DIM).to(dtype) for _ in range(3))
        runs: dict[str, Run] = {f"block {p}": attention_run(dtype, 1, 2048, 2048, p) for p in (16, 32, 64)}
        runs["torch SDPA"] = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        yield f"prefill attention 2048 {dtype}", runs
    yield "prefill attention 2048 by KV type", kv_types(1, 2048, 2048)


def write() -> Iterator[tuple[str, dict[str, Run]]]:
    def run(level: str | None, tokens: int, block: int, dtype: torch.dtype = BF16) -> Run:
        width = api.kv_width(DIM, dtype)
        caches = [torch.zeros(1200, 2, KV_HEADS, block, width, dtype=dtype) for _ in range(4)]
        k_TGD = torch.randn(tokens, KV_HEADS, DIM).bfloat16()
        first = (torch.randperm(1100)[:tokens] + 1) * block
        slot_T = first + 5 if tokens < 64 else torch.arange(tokens) + block

        def one(kv: Tensor) -> Run:
            def call() -> None:
                with native.using(level):
                    api.write_kv(k_TGD, k_TGD, kv, slot_T)

            return call

        return in_turn([one(kv) for kv in caches])

    for tokens in (1, 16, 2048):
        runs = {f"block {p}": run(None, tokens, p) for p in (16, 32, 64)}
        others = {"int8, block 32": run(None, tokens, 32, torch.int8), "torch": run("torch", tokens, 32)}
        yield f"write_kv {tokens} tokens bf16", runs | others


def linear() -> Iterator[tuple[str, dict[str, Run]]]:
    for dtype in (BF16, torch.float32, torch.float16):
        for outputs, inputs in ((4096, 1024), (1024, 3072), (32000, 1024)):
            copies = max(1, int(CACHE_BYTES / (outputs * inputs * dtype.itemsize)))
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
            ours = [api.pack_linear(w, None) for w in weights]
            onednn = [onednn_pack(w) for w in weights] if dtype != torch.float16 else []
            for rows in (1, 4, 8, 16, 32, 64, 128) if dtype != torch.float16 else (1, 8, 32):
                x = torch.randn(rows, inputs).to(dtype)
                runs: dict[str, Run] = {
                    "native": in_turn([lambda w=w, x=x: api.linear(x, w) for w in ours]),
                    "F.linear": in_turn([lambda w=w, x=x: F.linear(x, w) for w in weights]),
                }
                if onednn:
                    runs["oneDNN packed"] = in_turn([lambda w=w, x=x: onednn_linear(x, w) for w in onednn])
                yield f"linear {dtype} {outputs} x {inputs}, {rows} rows", runs


def onednn_pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 16)
    return packed


def onednn_linear(x_TI: Tensor, packed: Tensor) -> Tensor:
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed, None, "none", [], "")
    return y_TO


def small() -> Iterator[tuple[str, dict[str, Run]]]:
    def both(run: Run) -> dict[str, Run]:
        def fallback() -> None:
            with native.using("torch"):
                run()

        return {"native": run, "torch": fallback}

    table_MR, weight_E = torch.randn(4096, DIM), torch.ones(1024, dtype=BF16)
    for rows in (1, 16, 64):
        x_TE, residual_TE = torch.randn(rows, 1024).bfloat16(), torch.randn(rows, 1024).bfloat16()
        gate_up_T2F, position_T = torch.randn(rows, 6144).bfloat16(), torch.arange(rows)
        q_THD, k_TGD = torch.randn(rows, HEADS, DIM).bfloat16(), torch.randn(rows, KV_HEADS, DIM).bfloat16()
        yield (
            f"rms_norm + residual {rows} x 1024 bf16",
            both(lambda x=x_TE, r=residual_TE: api.rms_norm(x, weight_E, 1e-6, residual_TE=r)),
        )
        yield f"silu_mul {rows} x 3072 bf16", both(lambda g=gate_up_T2F: api.silu_mul(g))
        yield (
            f"rotary {rows} tokens, 16 + 8 heads bf16",
            both(lambda q=q_THD, k=k_TGD, p=position_T: api.rotary(q, k, table_MR, p)),
        )


def sample() -> Iterator[tuple[str, dict[str, Run]]]:
    logits_SV = torch.randn(16, 151936) * 3
    for name, top_k, top_p, greedy in (
        ("greedy", 0, 1.0, True),
        ("plain", 0, 1.0, False),
        ("top-p", 0, 0.9, False),
    ):
        params = api.SampleParams(
            torch.full((16,), 0.8),
            torch.full((16,), top_k, dtype=torch.int32),
            torch.full((16,), top_p),
            torch.zeros(16),
            torch.arange(16),
            torch.arange(16),
            greedy,
            top_p < 1,
        )

        def run(params: api.SampleParams = params) -> None:
            api.sample(logits_SV, params)

        def fallback(run: Run = run) -> None:
            with native.using("torch"):
                run()

        yield f"sample 16 x 151936, {name}", {"native": run, "torch": fallback}


GROUPS = {f.__name__: f for f in (attention, prefill, write, linear, small, sample)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(GROUPS), help="groups to run, comma-separated")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per figure")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    print(native.describe())
    results: dict[str, dict[str, dict[str, float]]] = {}
    for group in args.only.split(","):
        for title, runs in GROUPS[group]():
            results[title] = measure(runs, args.seconds)
            figures = [f"{name} {ms['min']:.4g} ({ms['median']:.4g})" for name, ms in results[title].items()]
            print(f"{title}, ms min (median): {'; '.join(figures)}", flush=True)
    if args.json:
        facts = {"machine": describe(), "backend": native.describe(), "milliseconds": results}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
