"""Decode: one query token per sequence. Memory bound: what counts is that every SM streams KV all the time.

Contexts differ by orders of magnitude, so each sequence's tiles are cut into *parts* of about equal size, and
a program takes one (part, kv head). The cut depends on all lengths, which only the device knows: every
program derives it again from the length vector (a sum and a scan of a few hundred integers), which costs less
than a launch and keeps the host, CUDA graphs and the other layers out of it.

    lengths          9   2   5   (tiles)      chunk = 4
    parts            3   1   2
    ends             3   4   6                part 4 -> sequence 2, tiles [0, 3)
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_attention.triton_config import DecodeConfig
from kernels.paged_attention.triton_tile import attend
from kernels.types import AttentionBatch


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
    groups, block_size, head_dim = kv_N2GPD.shape[2:]
    heads, sequences = q_THD.shape[1], batch.num_decodes
    longest_tiles = triton.cdiv(min(batch.max_seq_len, window or batch.max_seq_len), config.tile) + 1
    splits = longest_tiles > config.min_chunk_tiles
    target = triton.cdiv(config.target_programs, groups) if splits else 0
    most_parts = sequences + min(target, sequences * (triton.cdiv(longest_tiles, config.min_chunk_tiles) - 1))
    part_shape = (most_parts, heads) if splits else (1, 1)
    part_lse_IH = torch.empty(part_shape, dtype=torch.float32, device=q_THD.device)
    part_out_IHD = torch.empty((*part_shape, head_dim), dtype=torch.float32, device=q_THD.device)
    # The scan is as wide as the batch, in powers of four: few kernels to compile, few idle lanes.
    plan = {
        "BLOCK_S": max(64, 1 << (2 * triton.cdiv((sequences - 1).bit_length(), 2))),
        "TILE": config.tile,
        "MIN_CHUNK": config.min_chunk_tiles,
        "WINDOW": window > 0,
    }
    _decode[(most_parts, groups)](
        q_THD,
        kv_N2GPD,
        batch.page_table_SB,
        batch.seq_len_S,
        out_THD,
        part_out_IHD,
        part_lse_IH,
        q_THD.stride(0),
        q_THD.stride(1),
        batch.page_table_SB.stride(0),
        sequences,
        target,
        scale,
        window,
        softcap,
        GROUP=heads // groups,
        G=groups,
        P=block_size,
        D=head_dim,
        BLOCK_M=max(16, triton.next_power_of_2(heads // groups)),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        SOFTCAP=softcap > 0,
        SPLITS=splits,
        **plan,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits:
        _merge[(sequences, heads)](
            part_out_IHD,
            part_lse_IH,
            batch.seq_len_S,
            out_THD,
            sequences,
            target,
            window,
            H=heads,
            D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_I=16,
            **plan,
            num_warps=4,
        )


@triton.jit
def _parts(
    seq_len_ptr,
    sequences,
    target,
    window,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Returns, for each sequence, its number of tiles, of parts, and of parts up to and with it.

    Parts sum to at most `sequences + target`. An empty sequence has one part, which writes its zeros.
    """
    s = tl.arange(0, BLOCK_S)
    length = tl.load(seq_len_ptr + s, mask=s < sequences, other=0)
    tiles = tl.cdiv(length, TILE)
    if WINDOW:
        tiles -= tl.maximum(length - window, 0) // TILE
    chunk = tl.maximum(tl.cdiv(tl.sum(tiles, axis=0), target), MIN_CHUNK)
    parts = tl.where(s < sequences, tl.maximum(tl.cdiv(tiles, chunk), 1), 0)
    return tiles, parts, tl.cumsum(parts, axis=0)


@triton.jit(do_not_specialize=["table_stride", "sequences", "target", "scale", "window", "softcap"])
def _decode(
    q_ptr,
    kv_ptr,
    table_ptr,
    seq_len_ptr,
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    q_stride_t,
    q_stride_h,
    table_stride,
    sequences,
    target,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    item, g = tl.program_id(0), tl.program_id(1)
    seq, part, parts = item, 0, 1
    if SPLITS:
        _, parts_S, ends_S = _parts(seq_len_ptr, sequences, target, window, BLOCK_S, TILE, MIN_CHUNK, WINDOW)
        s = tl.arange(0, BLOCK_S)
        seq = tl.sum((ends_S <= item).to(tl.int32), axis=0)
        if seq >= BLOCK_S:
            return
        parts = tl.sum(tl.where(s == seq, parts_S, 0), axis=0)
        part = item - tl.sum(tl.where(s == seq, ends_S - parts_S, 0), axis=0)
    length = tl.load(seq_len_ptr + seq)
    first_tile = 0
    if WINDOW:
        first_tile = tl.maximum(length - window, 0) // TILE
    last_tile = tl.cdiv(length, TILE)
    part_tiles = tl.cdiv(last_tile - first_tile, parts)
    first_tile += part * part_tiles

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
        kv_ptr + g * (P * D),
        table_ptr + seq.to(tl.int64) * table_stride,
        tl.zeros((BLOCK_M,), tl.int32) + (length - 1),
        length - 1,
        length - 1,
        first_tile,
        tl.minimum(first_tile + part_tiles, last_tile),
        scale,
        window,
        softcap,
        G,
        P,
        D,
        BLOCK_D,
        TILE,
        WINDOW,
        SOFTCAP,
    )
    y = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    if parts == 1:
        out_at = (seq.to(tl.int64) * (G * GROUP) + head[:, None]) * D + d[None, :]
        tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=row_mask)
    else:
        row = item.to(tl.int64) * (G * GROUP) + head
        tl.store(part_out_ptr + row[:, None] * D + d[None, :], y, mask=row_mask)
        tl.store(part_lse_ptr + row, top + tl.log2(norm), mask=r < GROUP)


@triton.jit(do_not_specialize=["sequences", "target", "window"])
def _merge(
    part_out_ptr,
    part_lse_ptr,
    seq_len_ptr,
    out_ptr,
    sequences,
    target,
    window,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Averages the parts of one (sequence, head), weighted by their sums of exponentials."""
    seq, head = tl.program_id(0), tl.program_id(1)
    _, parts_S, ends_S = _parts(seq_len_ptr, sequences, target, window, BLOCK_S, TILE, MIN_CHUNK, WINDOW)
    is_seq = tl.arange(0, BLOCK_S) == seq
    parts = tl.sum(tl.where(is_seq, parts_S, 0), axis=0)
    if parts == 1:
        return
    end = tl.sum(tl.where(is_seq, ends_S, 0), axis=0)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    norm, top = 0.0, float("-inf")
    for start in range(end - parts, end, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        row = i.to(tl.int64) * H + head
        lse = tl.load(part_lse_ptr + row, mask=i < end, other=float("-inf"))
        mask = (i < end)[:, None] & (d < D)[None, :]
        part = tl.load(part_out_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(lse, axis=0))
        weight, shrink = tl.exp2(lse - higher), tl.exp2(top - higher)
        acc = acc * shrink + tl.sum(part * weight[:, None], axis=0)
        norm = norm * shrink + tl.sum(weight, axis=0)
        top = higher
    out_at = (seq.to(tl.int64) * H + head) * D + d
    tl.store(out_ptr + out_at, (acc / norm).to(out_ptr.dtype.element_ty), mask=d < D)
