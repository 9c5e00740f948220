"""Decode: one query token per sequence. Memory bound: what counts is that every SM streams KV all the time.

Where contexts are long enough to be split, programs take their work from the step's plan (`triton_plan.py`).
A sequence of one part goes straight to the output. The parts of the others are merged by the program that
finishes last, or by a second kernel; both sum them in the same order, so that the results are equal bit by
bit.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_format import factors, is_eight_bit
from kernels.paged_attention.triton_config import DecodeConfig
from kernels.paged_attention.triton_plan import most_parts, plan
from kernels.paged_attention.triton_tile import attend
from kernels.types import AttentionBatch

# Three programs of 4 warps on an SM, in 8 bits two; left to itself the assembler spills to make it one more.
REGISTERS, EIGHT_BIT_REGISTERS = 168, 255
MERGE_ELEMENTS = tl.constexpr(
    4096
)  # of the parts' results that a program holds at a time: 32 registers of 4 warps


def decode(
    q_THD: Tensor,
    kv_N2GPD: Tensor,
    batch: AttentionBatch,
    out_THD: Tensor,
    scale: float,
    window: int,
    softcap: float,
    config: DecodeConfig,
) -> None:
    """Fills the rows of the first `num_decodes` tokens of `out_THD`."""
    groups, block_size, width = kv_N2GPD.shape[2:]
    _, heads, head_dim = q_THD.shape
    items = most_parts(batch, groups, window, config)
    splits = items > batch.num_decodes
    if splits:
        cut = plan(batch, heads, groups, head_dim, window, config)
        scratch = (cut.work_W8, cut.part_out_WHD, cut.part_lse_WH, cut.arrived_SG)
    else:
        scratch = (batch.seq_len_S, out_THD, out_THD, batch.seq_len_S)  # read by none
    shape = {
        "GROUP": heads // groups,
        "G": groups,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }
    _decode[(items, groups)](
        q_THD,
        kv_N2GPD,
        factors(kv_N2GPD),
        batch.page_table_SB,
        batch.seq_len_S,
        out_THD,
        *scratch,
        q_THD.stride(0),
        q_THD.stride(1),
        batch.page_table_SB.stride(0),
        scale,
        window,
        softcap,
        **shape,
        P=block_size,
        SLAB=block_size * width,
        BLOCK_M=max(16, triton.next_power_of_2(heads // groups)),
        TILE=config.tile,
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        EIGHT=is_eight_bit(kv_N2GPD.dtype),
        SPLITS=splits,
        MERGES=config.last_merges,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=EIGHT_BIT_REGISTERS if is_eight_bit(kv_N2GPD.dtype) else REGISTERS,
    )
    if splits and not config.last_merges:
        _merge[(items, groups)](*scratch[:3], out_THD, **shape, num_warps=4)


@triton.jit(do_not_specialize=["table_stride", "scale", "window", "softcap"])
def _decode(
    q_ptr,
    kv_ptr,
    factor_ptr,
    table_ptr,
    seq_len_ptr,
    out_ptr,
    work_ptr,
    part_out_ptr,
    part_lse_ptr,
    arrived_ptr,
    q_stride_t,
    q_stride_h,
    table_stride,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EIGHT: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGES: tl.constexpr,
):
    item, g = tl.program_id(0), tl.program_id(1)
    if SPLITS:
        seq, first_tile, end_tile, first_item, parts = _read_work(work_ptr, item)
        if parts == 0:
            return
        length = tl.load(seq_len_ptr + seq)
    else:
        seq, first_tile, first_item, parts = item, 0, item, 1
        length = tl.load(seq_len_ptr + seq)
        end_tile = tl.cdiv(length, TILE)
        if WINDOW:
            first_tile = tl.maximum(length - window, 0) // TILE

    r, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row_mask = (r < GROUP)[:, None] & (d < D)[None, :]
    head = g * GROUP + r
    q_at = seq.to(tl.int64) * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_at, mask=row_mask, other=0.0)
    acc, norm, top = attend(
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.full((BLOCK_M,), float("-inf"), tl.float32),
        q,
        kv_ptr + g * SLAB,
        factor_ptr + g * SLAB // 4,
        table_ptr + seq.to(tl.int64) * table_stride,
        tl.zeros((BLOCK_M,), tl.int32) + (length - 1),
        length - 1,
        length - 1,
        first_tile,
        end_tile,
        scale,
        window,
        softcap,
        G,
        P,
        D,
        SLAB,
        BLOCK_D,
        TILE,
        WINDOW,
        SOFTCAP,
        EIGHT,
    )
    y = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    if parts == 1:
        out_at = (seq.to(tl.int64) * (G * GROUP) + head[:, None]) * D + d[None, :]
        tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=row_mask)
    else:
        row = item.to(tl.int64) * (G * GROUP) + head
        tl.store(part_out_ptr + row[:, None] * D + d[None, :], y, mask=row_mask)
        tl.store(part_lse_ptr + row, top + tl.log2(norm), mask=r < GROUP)
        if MERGES:
            # All threads have stored before one of them says so; whoever reads the last "done" sees it all.
            tl.debug_barrier()
            done = tl.atomic_add(arrived_ptr + seq * G + g, 1, sem="acq_rel", scope="gpu")
            if done == parts - 1:
                tl.debug_barrier()
                tl.store(arrived_ptr + seq * G + g, 0)
                _average(part_out_ptr, part_lse_ptr, out_ptr, seq, g, first_item, parts, GROUP, G, D, BLOCK_D)


@triton.jit
def _merge(
    work_ptr,
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Averages the parts of a (sequence, kv head): the program of its first item does."""
    item, g = tl.program_id(0), tl.program_id(1)
    seq, _, _, first_item, parts = _read_work(work_ptr, item)
    if (parts > 1) & (item == first_item):
        _average(part_out_ptr, part_lse_ptr, out_ptr, seq, g, first_item, parts, GROUP, G, D, BLOCK_D)


@triton.jit
def _read_work(work_ptr, item):
    at = work_ptr + item * 8
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit
def _average(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    seq,
    g,
    first_item,
    parts,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the mean of a kv head's parts, weighted by their sums of exponentials; a block of them at a
    time.

    Reads past the L1 cache, which does not know what other SMs wrote.
    """
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    BLOCK_I: tl.constexpr = max(1, MERGE_ELEMENTS // (HEADS * BLOCK_D))
    r, d = tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
    head = g * GROUP + r
    acc = tl.zeros((HEADS, BLOCK_D), tl.float32)
    norm = tl.zeros((HEADS,), tl.float32)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        row = (first_item + i).to(tl.int64)[:, None] * (G * GROUP) + head[None, :]
        mask = (i < parts)[:, None] & (r < GROUP)[None, :]
        lse = tl.load(part_lse_ptr + row, mask=mask, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            part_out_ptr + row[:, :, None] * D + d[None, None, :],
            mask=mask[:, :, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(top, tl.max(lse, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # rows past the group
        weight, shrink = tl.exp2(lse - base[None, :]), tl.exp2(top - base)
        acc = acc * shrink[:, None] + tl.sum(part * weight[:, :, None], axis=0)
        norm = norm * shrink + tl.sum(weight, axis=0)
        top = higher
    out_at = (seq.to(tl.int64) * (G * GROUP) + head[:, None]) * D + d[None, :]
    y = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=(r < GROUP)[:, None] & (d < D)[None, :])
