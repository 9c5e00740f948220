"""What a token's key (or value) of one head is in KV memory: its numbers, or int8 with a factor.

Knows one row; not blocks, and not the order of elements inside a slab, which is the backend's. In int8 a row
of D numbers is D bytes and the 4 bytes of a factor in fp32, largest magnitude / 127, so that a block remains
one contiguous unit for copies. The factor is computed when the row is written: nothing is calibrated.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR_BYTES = 4
LEVELS = 127  # of int8, on either side of 0


def kv_width(head_dim: int, dtype: torch.dtype) -> int:
    """The last dim of KV memory `[N, 2, G, P, width]` in this dtype."""
    return head_dim + FACTOR_BYTES if dtype == torch.int8 else head_dim


def head_dim_of(kv_N2GPD: Tensor) -> int:
    """D, of KV memory in any dtype."""
    width = kv_N2GPD.shape[4]
    return width - FACTOR_BYTES if kv_N2GPD.dtype == torch.int8 else width


def quantize(x_TGD: Tensor) -> Tensor:
    """Returns int8 rows of D + 4 bytes. A row that is not finite gets a factor of NaN, and stays it."""
    x_TGD = x_TGD.float()
    largest_TG1 = x_TGD.abs().amax(-1, keepdim=True)
    # A number over a tensor would be the rounded reciprocal times the number: not the native library's.
    inverse_TG1 = torch.where(largest_TG1 > 1e-30, largest_TG1.new_tensor(LEVELS) / largest_TG1, 0.0)
    rows_TGD = (x_TGD * inverse_TG1).round().nan_to_num().to(torch.int8)
    check_TG1 = (x_TGD * 0).sum(-1, keepdim=True)
    factor_TG1 = largest_TG1 / LEVELS + check_TG1
    return torch.cat((rows_TGD, factor_TG1.view(torch.int8)), -1)


def dequantize(rows: Tensor) -> Tensor:
    """Returns fp32 `[..., D]` of int8 rows `[..., D + 4]`."""
    factor = rows[..., -FACTOR_BYTES:].contiguous().view(torch.float32)
    return rows[..., :-FACTOR_BYTES].float() * factor
