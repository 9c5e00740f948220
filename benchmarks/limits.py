"""What the hardware allows: copy bandwidth and matrix rate, measured, and the least time of a decode step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.exec.device import count_cores
from engine.model.arch import ArchSpec
from kernels import api

_COPY_BYTES = {"cuda": 4 << 30, "cpu": 512 << 20}
_MATRIX = {"cuda": 8192, "cpu": 1024}
_REPEATS = 30
_MOST_S = 1.0  # no more repeats after this; bf16 on a CPU without its instructions takes that for one


class Limits(NamedTuple):
    """Of one device, measured.

    Attributes:
        bytes_per_s: read and written by a large copy, together.
        flops_per_s: of the fastest large product that we know of: torch's in the dtype of the weights, and on
            a CPU Quire's own, which may run on integers.
    """

    bytes_per_s: float
    flops_per_s: float


def measure(device: torch.device, dtype: torch.dtype) -> Limits:
    return Limits(_copy_rate(device), _product_rate(device, dtype))


def _copy_rate(device: torch.device) -> float:
    size = _COPY_BYTES[device.type]
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / _least_s(lambda: target.copy_(source), device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = _MATRIX[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    least_s = _least_s(lambda: a @ b, device)
    if device.type == "cpu":
        api.use_threads(count_cores())
        x, packed = a.bfloat16(), api.pack_linear(b.bfloat16(), None)
        least_s = min(least_s, _least_s(lambda: api.linear(x, packed), device))
    return 2 * n**3 / least_s


def least_decode_s(
    spec: ArchSpec, sequences: int, context: float, limits: Limits, weight_bits: float = 16
) -> float:
    """Weights are read or multiplied, whichever takes longer; then keys and values of 16 bits are read."""
    weights = decode_weights(spec)
    read_s = weights * weight_bits / 8 / limits.bytes_per_s
    multiply_s = max(read_s, 2 * weights * sequences / limits.flops_per_s)
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2
    return multiply_s + sequences * context * token_bytes / limits.bytes_per_s


def decode_weights(spec: ArchSpec) -> int:
    """Parameters that each decode step reads: all but the look-up of the embedding."""
    heads = spec.num_heads + 2 * spec.num_kv_heads
    attention = spec.hidden_size * spec.head_dim * (heads + spec.num_heads)
    return (
        spec.num_layers * (attention + 3 * spec.hidden_size * spec.mlp_size)
        + spec.vocab_size * spec.hidden_size
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _least_s(call: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _MOST_S:
        synchronize(device)
        before = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - before)
    return min(times)
