"""The gated activation of a feed-forward layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def silu_mul(gate_up_T2F: Tensor, *, activation: str = "silu") -> Tensor:
    """Returns `act(gate) * up`."""
    tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    y_TF = torch.empty((tokens, width), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    block = min(1024, triton.next_power_of_2(max(width, 16)))
    if y_TF.numel():
        _silu_mul[(tokens, triton.cdiv(width, block))](
            gate_up_T2F, y_TF, F=width, BLOCK=block, GELU=activation == "gelu_tanh", num_warps=4
        )
    return y_TF


@triton.jit
def _silu_mul(gate_up_ptr, y_ptr, F: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    gate = tl.load(gate_up_ptr + token * (2 * F) + f, mask=mask).to(tl.float32)
    up = tl.load(gate_up_ptr + token * (2 * F) + F + f, mask=mask).to(tl.float32)
    if GELU:
        # (1 + tanh(u)) / 2 is sigmoid(2u); u = sqrt(2 / pi) (x + 0.044715 x^3).
        y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + token * F + f, y.to(y_ptr.dtype.element_ty), mask=mask)
