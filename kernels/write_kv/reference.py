"""Scatters new keys and values into KV memory, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_format import is_eight_bit, quantize


def write_kv(k_TGD: Tensor, v_TGD: Tensor, kv_N2GPD: Tensor, slot_T: Tensor) -> None:
    """Writes token t's key and value to slot `block * P + offset`; slot -1 writes nothing.

    Slots of one call are distinct, -1 aside.
    """
    used = slot_T >= 0
    slot_U = slot_T[used]
    block_U, offset_U = slot_U // kv_N2GPD.shape[3], slot_U % kv_N2GPD.shape[3]
    k_UGD, v_UGD = k_TGD[used], v_TGD[used]
    if is_eight_bit(kv_N2GPD.dtype):
        # As bytes: torch does not scatter fp8.
        k_UGD, v_UGD = (quantize(x_UGD, kv_N2GPD.dtype).view(torch.int8) for x_UGD in (k_UGD, v_UGD))
        kv_N2GPD = kv_N2GPD.view(torch.int8)
    # Advanced indices split by a slice put their dimension first: the left side is [U, G, D].
    kv_N2GPD[block_U, 0, :, offset_U] = k_UGD.to(kv_N2GPD.dtype)
    kv_N2GPD[block_U, 1, :, offset_U] = v_UGD.to(kv_N2GPD.dtype)
