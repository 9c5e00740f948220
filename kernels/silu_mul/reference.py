"""The gated activation of a feed-forward layer, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up_T2F: Tensor, *, activation: str = "silu") -> Tensor:
    """Returns `act(gate) * up` of `[T, 2F]` rows that hold gate then up; fp32 inside, rounded once."""
    gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=-1)
    gate_TF = F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")
    return (gate_TF * up_TF).to(gate_up_T2F.dtype)
