"""Head norms, rotation and the write to KV memory in one launch; `rotary` and `write_kv` are parts of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_format import LEVELS, SMALLEST, factors, is_eight_bit
from kernels.types import HeadNorms

HEADS = 4  # of one token per program: fewer idle programs at few tokens than with all heads in one
TINY = tl.constexpr(SMALLEST)
# Adding and subtracting it rounds to whole numbers, halves to even, as the reference does.
ROUNDER = tl.constexpr(12582912.0)


def rotate_and_write(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_sin_MR: Tensor,
    position_T: Tensor,
    kv_N2GPD: Tensor,
    slot_T: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Norms and rotates q in place and returns it; stores k, normed and rotated, and v in memory."""
    launch(q_THD, k_TGD, v_TGD, (cos_sin_MR, position_T), (kv_N2GPD, slot_T), norms)
    return q_THD


def launch(
    q_THD: Tensor | None,
    k_TGD: Tensor,
    v_TGD: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
    memory: tuple[Tensor, Tensor] | None,
    norms: HeadNorms | None = None,
) -> None:
    """The kernel with what is not None. Without memory, keys are written back to where they came from."""
    tokens, groups, head_dim = k_TGD.shape
    heads = q_THD.shape[1] if q_THD is not None else 0
    q = k_TGD if q_THD is None else q_THD
    v = k_TGD if v_TGD is None else v_TGD
    # Stand-ins for what is left out are of the right type and read by none.
    cos_sin_MR, position_T = rotation or (k_TGD, k_TGD)
    kv_N2GPD, slot_T = memory or (k_TGD[None], k_TGD)
    q_weight, k_weight = (norms.q_weight_D, norms.k_weight_D) if norms else (k_TGD, k_TGD)
    half = cos_sin_MR.shape[1] // 2 if rotation else head_dim // 2
    rest = head_dim - 2 * half
    kv_programs = triton.cdiv(groups, HEADS)
    q_programs = triton.cdiv(heads, HEADS)
    _rotate_and_write[(tokens, q_programs + kv_programs * (1 if v_TGD is None else 2))](
        q,
        k_TGD,
        v,
        q_weight,
        k_weight,
        cos_sin_MR,
        position_T,
        kv_N2GPD,
        factors(kv_N2GPD) if memory else kv_N2GPD,
        slot_T,
        q.stride(0),
        q.stride(1),
        k_TGD.stride(0),
        k_TGD.stride(1),
        v.stride(0),
        v.stride(1),
        norms.eps if norms else 0.0,
        norms.offset if norms else 0.0,
        H=heads,
        G=groups,
        P=kv_N2GPD.shape[3] if memory else 0,
        D=head_dim,
        SLAB=kv_N2GPD.shape[3] * kv_N2GPD.shape[4] if memory else 0,
        Q_PROGRAMS=q_programs,
        KV_PROGRAMS=kv_programs,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        REST=rest,
        BLOCK_REST=triton.next_power_of_2(max(rest, 1)),
        HEADS=HEADS,
        NORMS=norms is not None,
        ROTATES=rotation is not None,
        WRITES=memory is not None,
        LEVELS=LEVELS[kv_N2GPD.dtype] if memory and is_eight_bit(kv_N2GPD.dtype) else 0,
        ROUNDS=memory is not None and kv_N2GPD.dtype == torch.int8,
        num_warps=1,  # its lanes read 16 bytes each then
    )


@triton.jit(
    do_not_specialize=["eps", "offset"],
    do_not_specialize_on_alignment=["position_ptr", "slot_ptr"],  # read one number at a time
)
def _rotate_and_write(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    position_ptr,
    kv_ptr,
    factor_ptr,
    slot_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    eps,
    offset,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    SLAB: tl.constexpr,
    Q_PROGRAMS: tl.constexpr,
    KV_PROGRAMS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
    NORMS: tl.constexpr,
    ROTATES: tl.constexpr,
    WRITES: tl.constexpr,
    LEVELS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < Q_PROGRAMS:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        at = q_ptr + token * q_stride_t + head * q_stride_h
        a, b, c = _load_heads(at, head < H, HALF, BLOCK_HALF, REST, BLOCK_REST)
        if NORMS:
            a, b, c = _norm(a, b, c, q_weight_ptr, eps, offset, D, HALF, BLOCK_HALF, REST, BLOCK_REST)
        if ROTATES:
            a, b = _rotate(a, b, cos_sin_ptr, position_ptr + token, HALF, BLOCK_HALF)
        _store_heads(at, a, b, c, head < H, HALF, BLOCK_HALF, REST, BLOCK_REST)
    elif part < Q_PROGRAMS + KV_PROGRAMS:
        head = (part - Q_PROGRAMS) * HEADS + tl.arange(0, HEADS)[:, None]
        at = k_ptr + token * k_stride_t + head * k_stride_h
        a, b, c = _load_heads(at, head < G, HALF, BLOCK_HALF, REST, BLOCK_REST)
        if NORMS:
            a, b, c = _norm(a, b, c, k_weight_ptr, eps, offset, D, HALF, BLOCK_HALF, REST, BLOCK_REST)
        if ROTATES:
            a, b = _rotate(a, b, cos_sin_ptr, position_ptr + token, HALF, BLOCK_HALF)
        if WRITES:
            _write(
                kv_ptr, factor_ptr, tl.load(slot_ptr + token), 0, head, a, b, c,
                G, P, D, SLAB, HALF, BLOCK_HALF, REST, BLOCK_REST, LEVELS, ROUNDS,
            )  # fmt: skip
        else:
            _store_heads(at, a, b, c, head < G, HALF, BLOCK_HALF, REST, BLOCK_REST)
    else:
        head = (part - Q_PROGRAMS - KV_PROGRAMS) * HEADS + tl.arange(0, HEADS)[:, None]
        at = v_ptr + token * v_stride_t + head * v_stride_h
        a, b, c = _load_heads(at, head < G, HALF, BLOCK_HALF, REST, BLOCK_REST)
        _write(
            kv_ptr, factor_ptr, tl.load(slot_ptr + token), 1, head, a, b, c,
            G, P, D, SLAB, HALF, BLOCK_HALF, REST, BLOCK_REST, LEVELS, ROUNDS,
        )  # fmt: skip


@triton.jit
def _load_heads(
    at, is_head, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr
):
    """A head in fp32: the halves that rotate with each other, and what lies past them."""
    i, j = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    mask = is_head & (i < HALF)
    a = tl.load(at + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF + i, mask=mask, other=0.0).to(tl.float32)
    # Where there is nothing past them, no lane loads, and the compiler drops it.
    c = tl.load(at + 2 * HALF + j, mask=is_head & (j < REST), other=0.0).to(tl.float32)
    return a, b, c


@triton.jit
def _store_heads(
    at,
    a,
    b,
    c,
    is_head,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    i, j = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    dtype: tl.constexpr = at.dtype.element_ty
    mask = is_head & (i < HALF)
    tl.store(at + i, a.to(dtype), mask=mask)
    tl.store(at + HALF + i, b.to(dtype), mask=mask)
    if REST:
        tl.store(at + 2 * HALF + j, c.to(dtype), mask=is_head & (j < REST))


@triton.jit
def _norm(
    a,
    b,
    c,
    weight_ptr,
    eps,
    offset,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1) + tl.sum(c * c, axis=1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    one_row = tl.full((1, 1), 1, tl.int1)
    weight_a, weight_b, weight_c = _load_heads(weight_ptr, one_row, HALF, BLOCK_HALF, REST, BLOCK_REST)
    return a * scale * (weight_a + offset), b * scale * (weight_b + offset), c * scale * (weight_c + offset)


@triton.jit
def _rotate(a, b, cos_sin_ptr, position_ptr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    i = tl.arange(0, BLOCK_HALF)
    at = cos_sin_ptr + tl.load(position_ptr) * (2 * HALF) + i
    cos = tl.load(at, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(at + HALF, mask=i < HALF, other=0.0)[None, :]
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _write(
    kv_ptr,
    factor_ptr,
    slot,
    WHICH: tl.constexpr,
    head,
    a,
    b,
    c,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    SLAB: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    LEVELS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Stores heads as keys (WHICH 0) or values (1) of a slot. LEVELS: the largest number that 8 bits hold."""
    # 64 bits, for a layer's memory can pass 2^31 elements.
    slab = ((slot // P) * 2 + WHICH) * (G * SLAB) + head * SLAB
    offset = slot % P
    stored = (head < G) & (slot >= 0)
    if LEVELS:
        largest = tl.maximum(tl.maximum(_largest(a), _largest(b)), _largest(c))
        inverse = tl.where(
            largest > TINY, tl.div_rn(tl.full(largest.shape, LEVELS, tl.float32), largest), 0.0
        )
        # What is not finite makes the factor NaN, for 8 bits may have no NaN of their own.
        check = tl.sum(a * 0.0, axis=1) + tl.sum(b * 0.0, axis=1) + tl.sum(c * 0.0, axis=1)
        factor = tl.div_rn(largest, tl.full(largest.shape, LEVELS, tl.float32)) + check[:, None]
        tl.store(factor_ptr + (slab + P * D) // 4 + offset, factor, mask=stored)
        a, b, c = a * inverse, b * inverse, c * inverse
    if ROUNDS:
        a, b, c = (a + ROUNDER) - ROUNDER, (b + ROUNDER) - ROUNDER, (c + ROUNDER) - ROUNDER
    _store_heads(kv_ptr + slab + offset * D, a, b, c, stored, HALF, BLOCK_HALF, REST, BLOCK_REST)


@triton.jit
def _largest(x):
    return tl.max(tl.abs(x), axis=1)[:, None]
