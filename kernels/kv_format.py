"""What a token's key (or value) of one head is in KV memory: its numbers, or 8 bits each with a factor.

Knows one row; not blocks, and not the order of elements inside a slab, which is the backend's. In 8 bits a
row of D numbers is D bytes and the 4 bytes of a factor in fp32, largest magnitude / the format's largest
number, so that a block remains one contiguous unit for copies. The factor is computed when the row is
written: nothing is calibrated. Formats: int8, and fp8 (e4m3), which GPUs convert faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR_BYTES = 4
LEVELS = {torch.int8: 127, torch.float8_e4m3fn: 448}  # the largest number of each format
SMALLEST = 1e-30  # a row whose largest magnitude is no more than this is zero


def is_eight_bit(dtype: torch.dtype) -> bool:
    """Whether rows in this dtype carry a factor."""
    return dtype in LEVELS


def kv_width(head_dim: int, dtype: torch.dtype) -> int:
    """The last dim of KV memory `[N, 2, G, P, width]` in this dtype."""
    return head_dim + FACTOR_BYTES if is_eight_bit(dtype) else head_dim


def head_dim_of(kv_N2GPD: Tensor) -> int:
    """D, of KV memory in any dtype."""
    width = kv_N2GPD.shape[4]
    return width - FACTOR_BYTES if is_eight_bit(kv_N2GPD.dtype) else width


def factors(kv_N2GPD: Tensor) -> Tensor:
    """The memory as fp32, for whoever knows where in a slab the factors are; itself where there are none."""
    return kv_N2GPD.view(torch.float32) if is_eight_bit(kv_N2GPD.dtype) else kv_N2GPD


def quantize(x_TGD: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Returns rows of D + 4 bytes. A row that is not finite gets a factor of NaN, and stays it."""
    x_TGD = x_TGD.float()
    levels = LEVELS[dtype]
    largest_TG1 = x_TGD.abs().amax(-1, keepdim=True)
    # A number over a tensor would be the rounded reciprocal times the number: not the native library's.
    inverse_TG1 = torch.where(largest_TG1 > SMALLEST, largest_TG1.new_tensor(levels) / largest_TG1, 0.0)
    scaled_TGD = (x_TGD * inverse_TG1).nan_to_num()
    rows_TGD = (scaled_TGD.round() if dtype == torch.int8 else scaled_TGD.clamp(-levels, levels)).to(dtype)
    check_TG1 = (x_TGD * 0).sum(-1, keepdim=True)
    factor_TG1 = largest_TG1 / levels + check_TG1
    return torch.cat((rows_TGD.view(torch.int8), factor_TG1.view(torch.int8)), -1).view(dtype)


def dequantize(rows: Tensor) -> Tensor:
    """Returns fp32 `[..., D]` of rows `[..., D + 4]`."""
    factor = rows.view(torch.int8)[..., -FACTOR_BYTES:].contiguous().view(torch.float32)
    return rows[..., :-FACTOR_BYTES].float() * factor
