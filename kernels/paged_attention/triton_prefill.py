"""Prefill: several query tokens per sequence, over a cached prefix and themselves. Compute bound.

A program takes a tile of (token, head of one kv group) rows, so that a group shares its keys. How many tiles
a sequence needs is known on the device alone; the grid is an upper bound: with tile t of sequence s numbered
`query_start[s] // TOKENS + s + t`, numbers never collide, and those that no sequence uses exit at once.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_format import factors, is_eight_bit
from kernels.paged_attention.triton_config import PrefillConfig
from kernels.paged_attention.triton_tile import attend
from kernels.types import AttentionBatch


def prefill(
    q_THD: Tensor,
    kv_N2GPD: Tensor,
    batch: AttentionBatch,
    out_THD: Tensor,
    scale: float,
    window: int,
    softcap: float,
    config: PrefillConfig,
) -> None:
    """Fills the rows of `out_THD` of the sequences after the first `num_decodes`."""
    groups, block_size, width = kv_N2GPD.shape[2:]
    head_dim = q_THD.shape[2]
    group = q_THD.shape[1] // groups
    block_m = max(config.rows, triton.next_power_of_2(group))
    skipped, sequences = batch.num_decodes, batch.seq_len_S.shape[0]
    tiles = (q_THD.shape[0] - skipped) // (block_m // group) + sequences - skipped
    # Heads vary fastest, so that programs that run together read different heads of the same blocks.
    _prefill[(groups, tiles)](
        q_THD,
        kv_N2GPD,
        factors(kv_N2GPD),
        batch.page_table_SB,
        batch.query_start_S1,
        batch.seq_len_S,
        out_THD,
        q_THD.stride(0),
        q_THD.stride(1),
        batch.page_table_SB.stride(0),
        skipped,
        sequences,
        scale,
        window,
        softcap,
        GROUP=group,
        G=groups,
        P=block_size,
        D=head_dim,
        SLAB=block_size * width,
        BLOCK_M=block_m,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_S=max(64, 1 << (2 * triton.cdiv((sequences - skipped - 1).bit_length(), 2))),
        TILE=config.tile,
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        EIGHT=is_eight_bit(kv_N2GPD.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )


@triton.jit(do_not_specialize=["table_stride", "skipped", "sequences", "scale", "window", "softcap"])
def _prefill(
    q_ptr,
    kv_ptr,
    factor_ptr,
    table_ptr,
    query_start_ptr,
    seq_len_ptr,
    out_ptr,
    q_stride_t,
    q_stride_h,
    table_stride,
    skipped,
    sequences,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EIGHT: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    g = tl.program_id(0)
    # Late tiles see the most keys: they start first, and light ones fill the gaps at the end.
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    s = skipped + tl.arange(0, BLOCK_S)
    start_S = tl.load(query_start_ptr + s, mask=s < sequences, other=2**30) - skipped
    tile_number_S = start_S // TOKENS + s - skipped
    seq = skipped + tl.sum((tile_number_S <= number).to(tl.int32), axis=0) - 1
    start = tl.load(query_start_ptr + seq)
    end = tl.load(query_start_ptr + seq + 1)
    first = start + (number - ((start - skipped) // TOKENS + seq - skipped)) * TOKENS
    if first >= end:
        return
    # A token's position less its index: the cached prefix, less where the sequence starts in the batch.
    shift = tl.load(seq_len_ptr + seq) - end
    last = tl.minimum(first + TOKENS, end) - 1

    r, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, head = first + r // GROUP, g * GROUP + r % GROUP
    row_mask = ((r < TOKENS * GROUP) & (token <= last))[:, None] & (d < D)[None, :]
    q_at = token.to(tl.int64)[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_at, mask=row_mask, other=0.0)
    first_tile = 0
    if WINDOW:
        first_tile = tl.maximum(first + shift - window + 1, 0) // TILE
    acc, norm, _ = attend(
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.full((BLOCK_M,), float("-inf"), tl.float32),
        q,
        kv_ptr + g * SLAB,
        factor_ptr + g * SLAB // 4,
        table_ptr + seq.to(tl.int64) * table_stride,
        token + shift,
        first + shift,
        last + shift,
        first_tile,
        tl.cdiv(last + shift + 1, TILE),
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
    out_at = (token.to(tl.int64)[:, None] * (G * GROUP) + head[:, None]) * D + d[None, :]
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=row_mask)
