"""Rounds inputs to fp8, a scale for each row: a row per program."""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear.fp8 import LARGEST


def round_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.linear.fp8.round_rows`."""
    rows, inputs = x_TI.shape
    value_TI = torch.empty((rows, inputs), dtype=torch.float8_e4m3fn, device=x_TI.device)
    scale_T1 = torch.empty((rows, 1), dtype=torch.float32, device=x_TI.device)
    block = triton.next_power_of_2(inputs)
    if rows:
        _round_rows[(rows,)](
            x_TI, value_TI, scale_T1, x_TI.stride(0), inputs,
            BLOCK=block, LARGEST=LARGEST, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return value_TI, scale_T1


@triton.jit
def _round_rows(x_ptr, value_ptr, scale_ptr, stride, inputs, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + i, mask=i < inputs, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12) / LARGEST
    # A row that is not finite stays so: its scale does.
    scale += tl.sum(x * 0.0, axis=0)
    value = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    tl.store(value_ptr + row * inputs + i, value.to(tl.float8e4nv), mask=i < inputs)
    tl.store(scale_ptr + row, scale)
