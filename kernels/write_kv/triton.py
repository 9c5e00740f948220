"""Scatters new keys and values into KV memory: one program per token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def write_kv(k_TGD: Tensor, v_TGD: Tensor, kv_N2GPD: Tensor, slot_T: Tensor) -> None:
    """Writes token t's key and value to its slot; slot -1 writes nothing."""
    tokens, groups, head_dim = k_TGD.shape
    block = triton.next_power_of_2(groups * head_dim)
    _write_kv[(tokens,)](
        k_TGD,
        v_TGD,
        kv_N2GPD,
        slot_T,
        k_TGD.stride(0),
        k_TGD.stride(1),
        v_TGD.stride(0),
        v_TGD.stride(1),
        G=groups,
        P=kv_N2GPD.shape[3],
        D=head_dim,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )


@triton.jit
def _write_kv(
    k_ptr,
    v_ptr,
    kv_ptr,
    slot_ptr,
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    i = tl.arange(0, BLOCK)
    g, d = i // D, i % D
    mask = i < G * D
    k = tl.load(k_ptr + token * k_stride_t + g * k_stride_g + d, mask=mask)
    v = tl.load(v_ptr + token * v_stride_t + g * v_stride_g + d, mask=mask)
    to = kv_ptr + (slot // P) * (2 * G * P * D) + (slot % P) * D + g * (P * D) + d
    tl.store(to, k, mask=mask)
    tl.store(to + G * P * D, v, mask=mask)
