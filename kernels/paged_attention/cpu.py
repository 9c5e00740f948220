"""Paged attention on the CPU: the native library on blocks in place, or torch over gathered copies.

The native layout inside a slab is not `[P, D]` (see `kernels/native/write_kv.h`), so writing, reading and
`gather` must agree on who owns a KV tensor: `is_native` decides for all of them, by shape and dtype alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native.library import DTYPE_CODE, describe, library
from kernels.types import AttentionBatch

from . import reference


def is_native(kv_N2GPD: Tensor) -> bool:
    """Whether the native library owns this KV memory: else it is row-major, and torch reads and writes it."""
    block, dim = kv_N2GPD.shape[3:]
    return (
        block % 16 == 0
        and dim % 8 == 0
        and dim <= 256
        and kv_N2GPD.dtype in DTYPE_CODE
        and library() is not None
    )


def gather(kv_N2GPD: Tensor, block_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns copies of K and V of some blocks, `[B, G, P, D]` each, whatever the layout. For tests."""
    k_BGPD, v_BGPD = kv_N2GPD[block_B].unbind(1)
    if is_native(kv_N2GPD) and kv_N2GPD.dtype == torch.bfloat16:
        b, g, p, d = k_BGPD.shape
        return (
            k_BGPD.reshape(b, g, d // 2, p, 2).transpose(2, 3).reshape(b, g, p, d),
            v_BGPD.reshape(b, g, p // 2, d, 2).transpose(3, 4).reshape(b, g, p, d),
        )
    if is_native(kv_N2GPD):
        return k_BGPD.reshape(*k_BGPD.shape[:2], k_BGPD.shape[3], -1).transpose(2, 3).contiguous(), v_BGPD
    return k_BGPD, v_BGPD


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
    _, _, kv_heads, block, dim = kv_N2GPD.shape
    tokens, heads, _ = q_THD.shape
    q_stride, q_head_stride, _ = q_THD.stride()
    out_THD = torch.empty((tokens, heads, dim), dtype=q_THD.dtype)
    page_table_SB = batch.page_table_SB
    lib.quire_paged_attention(
        DTYPE_CODE[q_THD.dtype], out_THD.data_ptr(), q_THD.data_ptr(), kv_N2GPD.data_ptr(),
        page_table_SB.data_ptr(), batch.query_start_S1.data_ptr(), batch.seq_len_S.data_ptr(),
        page_table_SB.stride(0), q_stride, q_head_stride, tokens, page_table_SB.shape[0], heads, kv_heads,
        block, dim, window, scale, softcap,
    )  # fmt: skip
    return out_THD


def __getattr__(name: str) -> str:
    # Asked for at start-up only; a plain constant would load the library on import.
    if name == "BACKEND":
        return f"cpu: {describe()}"
    raise AttributeError(name)
