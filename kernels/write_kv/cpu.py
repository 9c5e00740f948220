"""The CPU backend of `write_kv`. The native one also decides the order of elements inside a slab."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_format import head_dim_of
from kernels.native.library import DTYPE_CODE, library
from kernels.paged_attention.cpu import is_native

from . import reference


def write_kv(k_TGD: Tensor, v_TGD: Tensor, kv_N2GPD: Tensor, slot_T: Tensor) -> None:
    """See `kernels.api.write_kv`."""
    lib = library() if is_native(kv_N2GPD) else None
    if lib is None:
        return reference.write_kv(k_TGD, v_TGD, kv_N2GPD, slot_T)
    kv_heads, block = kv_N2GPD.shape[2:4]
    k_stride, k_head_stride, _ = k_TGD.stride()
    v_stride, v_head_stride, _ = v_TGD.stride()
    lib.quire_write_kv(
        DTYPE_CODE[k_TGD.dtype], k_TGD.data_ptr(), v_TGD.data_ptr(), kv_N2GPD.data_ptr(),
        slot_T.data_ptr(), slot_T.shape[0], k_stride, k_head_stride, v_stride, v_head_stride,
        kv_heads, block, head_dim_of(kv_N2GPD), kv_N2GPD.dtype == torch.int8,
    )  # fmt: skip
    return None
