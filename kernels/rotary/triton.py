"""Rotary position embedding in place: a program turns a few heads of one token, of q or of k."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8


def rotary(q_THD: Tensor, k_TGD: Tensor, cos_sin_MR: Tensor, position_T: Tensor) -> None:
    """Rotates the pairs (i, i + R / 2) of every head of q and k."""
    half = cos_sin_MR.shape[1] // 2
    q_programs = triton.cdiv(q_THD.shape[1], HEADS)
    k_programs = triton.cdiv(k_TGD.shape[1], HEADS)
    _rotary[(q_THD.shape[0], q_programs + k_programs)](
        q_THD,
        k_TGD,
        cos_sin_MR,
        position_T,
        q_THD.stride(0),
        q_THD.stride(1),
        k_TGD.stride(0),
        k_TGD.stride(1),
        H=q_THD.shape[1],
        G=k_TGD.shape[1],
        Q_PROGRAMS=q_programs,
        HALF=half,
        HEADS=HEADS,
        BLOCK=triton.next_power_of_2(half),
        num_warps=2,
    )


@triton.jit
def _rotary(
    q_ptr,
    k_ptr,
    cos_sin_ptr,
    position_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    H: tl.constexpr,
    G: tl.constexpr,
    Q_PROGRAMS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    angle_ptr = cos_sin_ptr + tl.load(position_ptr + token) * (2 * HALF) + i
    cos = tl.load(angle_ptr, mask=i < HALF, other=0.0)
    sin = tl.load(angle_ptr + HALF, mask=i < HALF, other=0.0)
    part = tl.program_id(1)
    if part < Q_PROGRAMS:
        _rotate(q_ptr + token * q_stride_t, q_stride_h, part * HEADS, cos, sin, H, HALF, HEADS, BLOCK)
    else:
        first = (part - Q_PROGRAMS) * HEADS
        _rotate(k_ptr + token * k_stride_t, k_stride_h, first, cos, sin, G, HALF, HEADS, BLOCK)


@triton.jit
def _rotate(
    x_ptr,
    stride_h,
    first,
    cos,
    sin,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = first + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (head < H) & (i < HALF)
    a_ptr = x_ptr + head * stride_h + i
    a = tl.load(a_ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(a_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tl.store(a_ptr, (a * cos[None, :] - b * sin[None, :]).to(dtype), mask=mask)
    tl.store(a_ptr + HALF, (b * cos[None, :] + a * sin[None, :]).to(dtype), mask=mask)
