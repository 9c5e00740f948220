"""Times the ops on a CUDA device: `python -m benchmarks.kernels [--json PATH]`. Under two minutes.

Each figure is the device time of one call: calls over several layers' memory, more than the L2 cache holds
together, are captured in one CUDA graph and its replays timed with events. So neither the host's launch time
nor a warm cache is in it. Attention is set against torch's `scaled_dot_product_attention` on contiguous keys.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import api
from kernels.types import AttentionBatch, SampleParams

DEVICE = "cuda"
BUDGET_S = 100.0
BLOCK_SIZE, HEAD_DIM, KV_HEADS = 64, 128, 8
# Rotating memory: several times the 50 to 60 MB of L2 of an H100 or H200.
ROTATE_BYTES = 512 << 20


@dataclass(frozen=True)
class Row:
    """One figure. `rate` is TB/s of the bytes that must move, or TFLOP/s where `unit` says so."""

    op: str
    shape: str
    microseconds: float
    rate: float
    unit: str
    sdpa_microseconds: float | None = None


def device_time_us(calls: list[Callable[[], object]], repeats: int = 10) -> float:
    """Returns the mean device time of one of the calls, which run in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / (repeats * len(calls))


def layers_for(bytes_per_layer: int) -> int:
    return max(2, min(16, ROTATE_BYTES // max(bytes_per_layer, 1) + 1))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_()


def paged(sequences: int, context: int, layers: int) -> tuple[list[Tensor], Tensor]:
    """Returns each layer's KV memory, and a page table of shuffled blocks."""
    blocks = -(-context // BLOCK_SIZE)
    total = sequences * blocks + 1
    memory = [random(total, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in range(layers)]
    table_SB = (torch.randperm(total - 1, device=DEVICE) + 1).int().view(sequences, blocks)
    return memory, table_SB


def batch_of(table_SB: Tensor, queries: int, context: int) -> AttentionBatch:
    sequences = table_SB.shape[0]
    return AttentionBatch(
        page_table_SB=table_SB,
        query_start_S1=torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE) * queries,
        seq_len_S=torch.full((sequences,), context, dtype=torch.int32, device=DEVICE),
        num_decodes=sequences if queries == 1 else 0,
        max_query_len=queries,
        max_seq_len=context,
    )


def attention(heads: int, sequences: int, queries: int, context: int) -> Row:
    kv_bytes = sequences * context * 2 * KV_HEADS * HEAD_DIM * 2
    layers = layers_for(kv_bytes)
    memory, table_SB = paged(sequences, context, layers)
    batch = batch_of(table_SB, queries, context)
    q_THD = random(sequences * queries, heads, HEAD_DIM)
    scale = HEAD_DIM**-0.5

    def paged_call(kv: Tensor) -> Callable[[], object]:
        return lambda: api.paged_attention(q_THD, kv, batch, scale=scale)

    took = device_time_us([paged_call(kv) for kv in memory])
    del memory
    shape = f"heads {heads}/{KV_HEADS} x {HEAD_DIM}, {sequences} x ({queries} of {context})"
    sdpa = sdpa_us(heads, sequences, queries, context, layers)
    if queries == 1:
        return Row("decode", shape, took, kv_bytes / took / 1e6, "TB/s", sdpa)
    visible = sequences * (queries * (context - queries) + queries * (queries + 1) // 2)
    return Row("prefill", shape, took, 4 * heads * HEAD_DIM * visible / took / 1e6, "TFLOP/s", sdpa)


def sdpa_us(heads: int, sequences: int, queries: int, context: int, layers: int) -> float | None:
    """Times torch's attention on contiguous memory; None for chunks, whose mask it has no fast path for."""
    if queries not in (1, context):
        return None
    q = random(sequences, heads, queries, HEAD_DIM)
    memory = [[random(sequences, KV_HEADS, context, HEAD_DIM) for _ in range(2)] for _ in range(layers)]

    def call(k: Tensor, v: Tensor) -> Callable[[], object]:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

    return device_time_us([call(k, v) for k, v in memory])


def elementwise(tokens: int) -> Iterator[Row]:
    """The ops that move each byte once, at an 8B model's sizes."""
    heads, hidden, feed_forward = 32, 4096, 14336
    layers = layers_for(tokens * feed_forward * 6)
    memory, _ = paged(1, max(tokens, 4096), layers)
    slot_T = torch.randperm(max(tokens, 4096), device=DEVICE)[:tokens] + BLOCK_SIZE
    k_v = [random(tokens, 2 * KV_HEADS, HEAD_DIM) for _ in range(layers)]
    calls: list[Callable[[], object]] = [
        lambda kv=kv, x=x: api.write_kv(x[:, :KV_HEADS], x[:, KV_HEADS:], kv, slot_T)  # type: ignore[misc]
        for kv, x in zip(memory, k_v, strict=True)
    ]
    yield moved("write_kv", tokens, calls, 2 * 2 * 2 * tokens * KV_HEADS * HEAD_DIM)

    weight = random(hidden)
    x, residual = ([random(tokens, hidden) for _ in range(layers)] for _ in range(2))
    calls = [
        lambda a=a, b=b: api.rms_norm(a, weight, 1e-6, residual_TE=b)  # type: ignore[misc]
        for a, b in zip(x, residual, strict=True)
    ]
    yield moved("rms_norm + residual", tokens, calls, 4 * 2 * tokens * hidden)

    position_T = torch.arange(tokens, device=DEVICE)
    table_MR = random(max(tokens, 4096), HEAD_DIM, dtype=torch.float32)
    qkv = [random(tokens, heads + 2 * KV_HEADS, HEAD_DIM) for _ in range(layers)]
    calls = [
        lambda t=t: api.rotary(t[:, :heads], t[:, heads : heads + KV_HEADS], table_MR, position_T)  # type: ignore[misc]
        for t in qkv
    ]
    yield moved("rotary", tokens, calls, 2 * 2 * tokens * (heads + KV_HEADS) * HEAD_DIM)

    gate_up = [random(tokens, 2 * feed_forward) for _ in range(layers)]
    calls = [lambda t=t: api.silu_mul(t) for t in gate_up]  # type: ignore[misc]
    yield moved("silu_mul", tokens, calls, 3 * 2 * tokens * feed_forward)


def sampling(rows: int, vocabulary: int = 151936) -> Iterator[Row]:
    logits = [
        random(rows, vocabulary, dtype=torch.float32) * 3 for _ in range(layers_for(rows * vocabulary * 4))
    ]

    def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=DEVICE)

    for name, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("temperature", 0.8, 0, 1.0),
        ("top-p", 0.8, 0, 0.95),
        ("top-k top-p", 0.8, 50, 0.95),
    ):
        params = SampleParams(
            temperature_S=column(temperature),
            top_k_S=column(top_k, torch.int32),
            top_p_S=column(top_p),
            min_p_S=column(0.0),
            seed_S=column(1, torch.int64),
            position_S=column(1, torch.int64),
            all_greedy=temperature == 0,
            any_filter=top_k > 0 or top_p < 1,
        )
        calls: list[Callable[[], object]] = [
            lambda x=x, params=params: api.sample(x, params)  # type: ignore[misc]
            for x in logits
        ]
        yield moved(f"sample {name}", rows, calls, 4 * rows * vocabulary)


def moved(op: str, rows: int, calls: list[Callable[[], object]], moved_bytes: int) -> Row:
    took = device_time_us(calls)
    return Row(op, f"{rows} rows", took, moved_bytes / took / 1e6, "TB/s")


def all_rows() -> Iterator[Row]:
    """The table in the order of what matters most, in case the time runs out."""
    for heads in (32, 16):
        for sequences in (1, 8, 32, 128):
            for context in (1024, 4096, 16384):
                if sequences * context <= 32 * 16384:
                    yield attention(heads, sequences, 1, context)
        for sequences, queries, context in (
            (1, 512, 512),
            (1, 2048, 2048),
            (1, 8192, 8192),
            (1, 2048, 10240),
        ):
            yield attention(heads, sequences, queries, context)
    for rows in (1, 32, 256):
        yield from sampling(rows)
    for tokens in (1, 32, 256, 4096):
        yield from elementwise(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels: this machine has no CUDA device, so there is nothing to time")
        return
    started = time.monotonic()
    rows, complete = [], True
    for row in all_rows():
        rows.append(row)
        versus = f"   sdpa {row.sdpa_microseconds:9.1f} us" if row.sdpa_microseconds else ""
        print(
            f"{row.op:20} {row.shape:44} {row.microseconds:9.1f} us {row.rate:7.2f} {row.unit}{versus}",
            flush=True,
        )
        if time.monotonic() - started > BUDGET_S:
            complete = False
            print(f"stopped after {BUDGET_S:.0f} s; the rest of the table is missing")
            break
    if options.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "backend": api.backend_name(DEVICE),
            "torch": torch.__version__,
            "complete": complete,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
