"""The CPU backend of `silu_mul`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native.library import DTYPE_CODE, library

from . import reference

_ACTIVATION_CODE = {"silu": 0, "gelu_tanh": 1}


def silu_mul(gate_up_T2F: Tensor, *, activation: str = "silu") -> Tensor:
    """See `kernels.api.silu_mul`."""
    lib = library()
    code = DTYPE_CODE.get(gate_up_T2F.dtype)
    if lib is None or code is None:
        return reference.silu_mul(gate_up_T2F, activation=activation)
    tokens, size = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    y_TF = torch.empty((tokens, size), dtype=gate_up_T2F.dtype)
    lib.quire_gate_mul(
        code, _ACTIVATION_CODE[activation], gate_up_T2F.data_ptr(), y_TF.data_ptr(), tokens, size
    )
    return y_TF
