"""The sweeps over paged attention: decode as a share of the copy bandwidth, prefill in TFLOP/s."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels import rivals
from benchmarks.kernels.rows import Row
from benchmarks.kernels.timing import Best, Call, Lab
from kernels.kv_format import kv_width
from kernels.paged_attention.triton import paged_attention
from kernels.types import AttentionBatch

HEAD_DIM, KV_HEADS = 128, 8
FORMATS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Shape:
    """A batch whose sequences compute `queries` tokens each, over contexts of that mean length."""

    heads: int
    sequences: int
    context: int
    queries: int = 1
    block_size: int = 64
    zipf: bool = False
    memory: str = "bf16"
    deterministic: bool = False

    def __str__(self) -> str:
        what = f"{self.queries} of " if self.queries > 1 else ""
        notes = [self.memory] * (self.memory != "bf16") + ["zipf"] * self.zipf
        notes += [f"block {self.block_size}"] + ["deterministic"] * self.deterministic
        return f"{self.heads}/{KV_HEADS} heads, {self.sequences} x {what}{self.context}, {', '.join(notes)}"

    def lengths(self) -> list[int]:
        """Equal ones, or proportional to 1 / rank with the same sum."""
        if not self.zipf:
            return [self.context] * self.sequences
        weights = [1 / rank for rank in range(1, self.sequences + 1)]
        share = self.context * self.sequences / sum(weights)
        return [max(1, round(share * weight)) for weight in weights]

    @property
    def kv_bytes(self) -> int:
        """What a call must read."""
        dtype = FORMATS[self.memory]
        return sum(self.lengths()) * 2 * KV_HEADS * kv_width(HEAD_DIM, dtype) * dtype.itemsize


def decode_shapes(lab: Lab) -> Iterator[Shape]:
    """What matters most first, in case the time runs out."""
    if lab.dry:
        yield Shape(16, 3, 20, block_size=16)
        yield Shape(16, 3, 20, block_size=16, zipf=True, memory="int8")
        return
    first = ((32, 4096), (32, 1024), (1, 1024))
    rest = [(b, c) for b in (1, 8, 32, 128, 256) for c in (512, 1024, 4096, 8192, 32768)]
    sizes = [*first, *(size for size in rest if size not in first)]
    for sequences, context in sizes:
        yield Shape(32, sequences, context)
    few = ((32, 4096), (1, 8192), (32, 1024), (128, 4096), (256, 1024))
    others = (
        {"deterministic": True},
        {"memory": "fp8"},
        {"zipf": True},
        {"block_size": 16},
        {"memory": "int8"},
    )
    for options in others:
        for sequences, context in few:
            yield Shape(32, sequences, context, **options)  # type: ignore[arg-type]
    for heads in (16, 64):
        for sequences, context in sizes:
            yield Shape(heads, sequences, context)
    for options in others:
        for sequences, context in few:
            yield Shape(16, sequences, context, **options)  # type: ignore[arg-type]


def prefill_shapes(lab: Lab) -> Iterator[Shape]:
    """Whole prompts, chunks over a cached prefix, and batches of prompts."""
    if lab.dry:
        yield Shape(16, 1, 40, queries=24, block_size=16)
        return
    for heads in (32, 16, 64):
        for tokens in (8192, 2048, 512, 32768):
            yield Shape(heads, 1, tokens, queries=tokens)
        for prefix in (8192, 32768):
            yield Shape(heads, 1, prefix + 2048, queries=2048)
        for sequences, tokens in ((8, 1024), (32, 256)):
            yield Shape(heads, sequences, tokens, queries=tokens)
    for memory in ("fp8", "int8"):
        yield Shape(32, 1, 8192, queries=8192, memory=memory)
    yield Shape(32, 1, 8192, queries=8192, block_size=16)


def measure(lab: Lab, shape: Shape, best: Best, with_flex: bool = False) -> Row | None:
    """One shape, ours and its rivals; None where memory does not hold it."""
    layers = lab.layers_for(shape.kv_bytes)
    if not lab.fits(layers * shape.kv_bytes):
        return None
    if shape.memory == "fp8" and not lab.dry and torch.cuda.get_device_capability() < (8, 9):
        return None
    memory, batch, q_THD = inputs_of(lab, shape, layers)
    took = lab.time_us(calls(shape, q_THD, memory, batch), before=batch.plans.clear)
    others = {}
    if shape.memory == "bf16" and not shape.deterministic:
        beside = rivals.outcomes(lab, q_THD, memory, batch, uniform=not shape.zipf, with_flex=with_flex)
        others = dict(beside)
    if shape.queries == 1:
        rate = shape.kv_bytes / took * 1e6
        return Row("decode", str(shape), took, rate / 1e12, "TB/s", rate / best.copy_bytes_per_s, others)
    visible = shape.sequences * shape.queries * (2 * shape.context - shape.queries + 1) // 2
    flops = 4 * shape.heads * HEAD_DIM * visible / took * 1e6
    return Row("prefill", str(shape), took, flops / 1e12, "TFLOP/s", flops / best.matmul_flops, others)


def calls(shape: Shape, q_THD: Tensor, memory: list[Tensor], batch: AttentionBatch) -> list[Call]:
    """A call for each layer's memory."""
    return [
        functools.partial(
            paged_attention, q_THD, kv_N2GPD, batch, scale=HEAD_DIM**-0.5, deterministic=shape.deterministic
        )
        for kv_N2GPD in memory
    ]


def inputs_of(lab: Lab, shape: Shape, layers: int) -> tuple[list[Tensor], AttentionBatch, Tensor]:
    """Each layer's KV memory, and a batch whose page tables are shuffled blocks."""
    lengths = shape.lengths()
    counts = [-(-length // shape.block_size) for length in lengths]
    free = (torch.randperm(sum(counts)) + 1).int()
    table_SB = torch.zeros(shape.sequences, max(counts), dtype=torch.int32)
    for s, blocks in enumerate(free.split(counts)):
        table_SB[s, : len(blocks)] = blocks
    dtype = FORMATS[shape.memory]
    size = (sum(counts) + 1, 2, KV_HEADS, shape.block_size, kv_width(HEAD_DIM, dtype))
    batch = AttentionBatch(
        page_table_SB=table_SB.to(lab.device),
        query_start_S1=torch.arange(shape.sequences + 1, dtype=torch.int32, device=lab.device)
        * shape.queries,
        seq_len_S=torch.tensor(lengths, dtype=torch.int32, device=lab.device),
        num_decodes=shape.sequences if shape.queries == 1 else 0,
        max_query_len=shape.queries,
        max_seq_len=max(lengths),
    )
    q_THD = lab.random(shape.sequences * shape.queries, shape.heads, HEAD_DIM)
    return [_memory(lab, size, dtype) for _ in range(layers)], batch, q_THD


def _memory(lab: Lab, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        return lab.random(*size)
    # Bits that are finite numbers and small factors, whichever way they are read.
    return torch.full(size, 0x33, dtype=torch.uint8, device=lab.device).view(dtype)
