"""The other kernels, at an 8B model's sizes: what moves each byte once, linears in few bits, the sampler."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from benchmarks.kernels.rows import Row
from benchmarks.kernels.timing import Best, Call, Lab
from kernels.linear import triton as linear
from kernels.linear.quantized import quantize
from kernels.rms_norm.triton import rms_norm
from kernels.rotate_and_write.triton import rotate_and_write
from kernels.sample.triton import sample
from kernels.silu_mul.triton import silu_mul
from kernels.types import HeadNorms, SampleParams

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 64


def op_rows(lab: Lab, best: Best) -> Iterator[Row]:
    """Few and many rows of everything."""
    for rows in (2,) if lab.dry else (1, 32, 256, 4096):
        yield from _elementwise(lab, best, rows)
    for rows in (2,) if lab.dry else (1, 16, 64, 256, 2048):
        yield from _linears(lab, best, rows)
    for rows in (2,) if lab.dry else (1, 32, 256):
        yield from _sampling(lab, best, rows)


def _moved(lab: Lab, best: Best, op: str, shape: str, calls: list[Call], moved_bytes: int) -> Row:
    took = lab.time_us(calls)
    rate = moved_bytes / took * 1e6
    return Row(op, shape, took, rate / 1e12, "TB/s", rate / best.copy_bytes_per_s)


def _elementwise(lab: Lab, best: Best, tokens: int) -> Iterator[Row]:
    hidden, feed_forward = (64, 96) if lab.dry else (4096, 14336)
    layers = lab.layers_for(tokens * feed_forward * 6)
    shape = f"{tokens} tokens"
    weight = lab.random(hidden)
    pairs = [(lab.random(tokens, hidden), lab.random(tokens, hidden)) for _ in range(layers)]
    calls: list[Call] = [functools.partial(rms_norm, x, weight, 1e-6, residual_TE=r) for x, r in pairs]
    yield _moved(lab, best, "rms_norm + residual", shape, calls, 4 * 2 * tokens * hidden)

    gate_up = [lab.random(tokens, 2 * feed_forward) for _ in range(layers)]
    calls = [functools.partial(silu_mul, x) for x in gate_up]
    yield _moved(lab, best, "silu_mul", shape, calls, 3 * 2 * tokens * feed_forward)

    slots = torch.randperm(max(tokens, 128), device=lab.device)[:tokens] + BLOCK_SIZE
    blocks = max(tokens, 128) // BLOCK_SIZE + 1
    position_T = torch.arange(tokens, device=lab.device)
    table_MR = lab.random(tokens, HEAD_DIM, dtype=torch.float32)
    norms = HeadNorms(lab.random(HEAD_DIM), lab.random(HEAD_DIM), 1e-6, 0.0)
    calls = []
    for _ in range(layers):
        qkv = lab.random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        kv_N2GPD = lab.random(blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        calls.append(functools.partial(rotate_and_write, *qkv, table_MR, position_T, kv_N2GPD, slots, norms))
    moved_bytes = 2 * 2 * tokens * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    yield _moved(lab, best, "norm, rotate, write", shape, calls, moved_bytes)


def _linears(lab: Lab, best: Best, rows: int) -> Iterator[Row]:
    outputs, inputs = (64, 128) if lab.dry else (28672, 4096)
    x_TI, weight_OI = lab.random(rows, inputs), lab.random(outputs, inputs)
    layers = lab.layers_for(outputs * inputs // 2)
    forms = {
        "bf16, cuBLAS": None,
        "bf16, fixed order": linear.pack_16_bits(weight_OI, None),
        "int8": linear.pack(quantize(weight_OI, 8, 0), None),
        "int4 g128": linear.pack(quantize(weight_OI, 4, 128), None),
    }
    for name, packed in forms.items():
        if packed is None:
            copies = [weight_OI.clone() for _ in range(layers)]
            calls: list[Call] = [functools.partial(torch.nn.functional.linear, x_TI, w) for w in copies]
            weight_bytes = weight_OI.numel() * 2
        else:
            others = [dataclasses.replace(packed, weight=packed.weight.clone()) for _ in range(layers)]
            calls = [functools.partial(linear.linear, x_TI, other) for other in others]
            weight_bytes = packed.num_bytes
        took = lab.time_us(calls)
        bound_us = (
            max(weight_bytes / best.copy_bytes_per_s, 2 * rows * outputs * inputs / best.matmul_flops) * 1e6
        )
        rate = 2 * rows * outputs * inputs / took / 1e6
        yield Row(f"linear {name}", f"{rows} x {inputs} -> {outputs}", took, rate, "TFLOP/s", bound_us / took)


def _sampling(lab: Lab, best: Best, rows: int) -> Iterator[Row]:
    vocabulary = 300 if lab.dry else 151936
    layers = lab.layers_for(rows * vocabulary * 4)
    logits = [lab.random(rows, vocabulary, dtype=torch.float32) * 3 for _ in range(layers)]

    def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=lab.device)

    for name, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("temperature", 0.8, 0, 1.0),
        ("top-p", 0.8, 0, 0.95),
        ("top-k top-p", 0.8, 50, 0.95),
    ):
        one = column(1, torch.int64)
        params = SampleParams(
            column(temperature), column(top_k, torch.int32), column(top_p), column(0.0), one, one,
            all_greedy=temperature == 0, any_filter=top_k > 0 or top_p < 1,
        )  # fmt: skip
        calls: list[Call] = [functools.partial(sample, x, params) for x in logits]
        yield _moved(lab, best, f"sample {name}", f"{rows} x {vocabulary}", calls, 4 * rows * vocabulary)
