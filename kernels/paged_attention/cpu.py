"""Paged attention on the CPU: the native library on blocks in place, or torch over gathered copies.

The native layout inside a slab is not `[P, D]` (see `kernels/native/write_kv.h`), so writing and reading must
agree on who owns a KV tensor: `is_native` decides for both, by shape and dtype alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_format import head_dim_of
from kernels.native.library import DTYPE_CODE, library
from kernels.types import AttentionBatch

from . import reference


def is_native(kv_N2GPD: Tensor) -> bool:
    """Whether the native library owns this KV memory: else it is row-major, and torch reads and writes it."""
    block, dim = kv_N2GPD.shape[3], head_dim_of(kv_N2GPD)
    return (
        block % 16 == 0
        and dim % 8 == 0
        and dim <= 256
        and (kv_N2GPD.dtype in DTYPE_CODE or kv_N2GPD.dtype == torch.int8)
        and library() is not None
    )


def paged_attention(
    q_THD: Tensor,
    kv_N2GPD: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """See `kernels.api.paged_attention`; sums in fp32 whatever the dtype."""
    lib = library() if is_native(kv_N2GPD) else None
    if lib is None:
        return reference.paged_attention(q_THD, kv_N2GPD, batch, scale=scale, window=window, softcap=softcap)
    kv_heads, block = kv_N2GPD.shape[2:4]
    tokens, heads, dim = q_THD.shape
    q_stride, q_head_stride, _ = q_THD.stride()
    out_THD = torch.empty((tokens, heads, dim), dtype=q_THD.dtype)
    page_table_SB = batch.page_table_SB
    lib.quire_paged_attention(
        DTYPE_CODE[q_THD.dtype], out_THD.data_ptr(), q_THD.data_ptr(), kv_N2GPD.data_ptr(),
        page_table_SB.data_ptr(), batch.query_start_S1.data_ptr(), batch.seq_len_S.data_ptr(),
        page_table_SB.stride(0), q_stride, q_head_stride, tokens, page_table_SB.shape[0], heads, kv_heads,
        block, dim, window, scale, softcap, kv_N2GPD.dtype == torch.int8,
    )  # fmt: skip
    return out_THD
