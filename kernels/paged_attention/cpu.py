"""Paged attention on the CPU: the native library on blocks in place, or torch over gathered copies.

The native layout inside a slab is not `[P, D]` (see `kernels/native/write_kv.h`), so writing, reading and
`gather` must agree on who owns a KV tensor: `is_native` decides for all of them, by shape and dtype alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_format import FACTOR_BYTES, head_dim_of
from kernels.native.library import DTYPE_CODE, describe, library
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


def gather(kv_N2GPD: Tensor, block_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns copies of K and V of some blocks, `[B, G, P, D]` each, whatever the layout. For tests.

    int8 rows come with their factors, as `kv_format.quantize` makes them.
    """
    k_BGPD, v_BGPD = kv_N2GPD[block_B].unbind(1)
    if not is_native(kv_N2GPD):
        return k_BGPD, v_BGPD
    shape = (*k_BGPD.shape[:3], head_dim_of(kv_N2GPD))
    if kv_N2GPD.dtype == torch.int8:
        (k_BGPD, k_factors), (v_BGPD, v_factors) = (_split_slabs(x, shape[3]) for x in (k_BGPD, v_BGPD))
        k_BGPD, v_BGPD = _in_order(k_BGPD, v_BGPD, shape)
        return torch.cat((k_BGPD, k_factors), -1), torch.cat((v_BGPD, v_factors), -1)
    return _in_order(k_BGPD, v_BGPD, shape)


def _split_slabs(x_BGPD: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """int8 slabs -> their elements, and a row of factor bytes per token."""
    b, g, p, _ = x_BGPD.shape
    bytes_BGX = x_BGPD.reshape(b, g, -1)
    return bytes_BGX[..., : p * dim], bytes_BGX[..., p * dim :].reshape(b, g, p, FACTOR_BYTES)


def _in_order(k: Tensor, v: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Undoes the order of the elements, which `kernels/native/write_kv.h` describes."""
    b, g, p, d = shape
    i = 2 if k.dtype in (torch.bfloat16, torch.int8) else 1
    k_BGPD = k.reshape(b, g, d // i, p, i).transpose(2, 3).reshape(b, g, p, d)
    v_BGPD = v.reshape(b, g, p // i, d, i).transpose(3, 4).reshape(b, g, p, d)
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


def __getattr__(name: str) -> str:
    # Asked for at start-up only; a plain constant would load the library on import.
    if name == "BACKEND":
        return f"cpu: {describe()}"
    raise AttributeError(name)
