"""The inner loop that decode and prefill share: online softmax over tiles of paged keys and values.

A kernel's rows are (token, query head) pairs that share one kv head. Scores are kept in base 2: `exp2` is the
GPU's instruction, and log2(e) goes into the scale.

A slab, the rows of one (block, head), is P rows of D elements; in 8 bits their P factors in fp32 follow, so
that rows stay 16-byte aligned. A key's factor goes into its column of scores, a value's into its weight.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    acc,
    norm,
    top,
    q,
    kv_ptr,
    factor_ptr,
    table_ptr,
    row_position,
    first_position,
    last_position,
    tile_begin,
    tile_end,
    scale,
    window,
    softcap,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EIGHT: tl.constexpr,
):
    """Adds the tiles [tile_begin, tile_end) to the running (acc, norm, top) of rows of one sequence.

    The rows lie at positions first_position to last_position; row_position gives each its own. The tiles
    split in three, of which only the outer two need masks:

        tile_begin      full_begin                    full_end       tile_end
        | window edge   | every row sees every key    | diagonal     |
    """
    full_end = tl.minimum(tl.maximum((first_position + 1) // TILE, tile_begin), tile_end)
    full_begin = tile_begin
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(first_position - window + 1, 0)
        full_begin = tl.maximum(tl.cdiv(tl.maximum(last_position - window + 1, 0), TILE), tile_begin)
        full_begin = tl.minimum(full_begin, full_end)
        acc, norm, top = _tiles(
            acc, norm, top, q, kv_ptr, factor_ptr, table_ptr, row_position, lowest, last_position,
            tile_begin, full_begin, scale, window, softcap,
            G, P, D, SLAB, BLOCK_D, TILE, WINDOW, SOFTCAP, EIGHT, MASKED=True,
        )  # fmt: skip
    acc, norm, top = _tiles(
        acc, norm, top, q, kv_ptr, factor_ptr, table_ptr, row_position, lowest, last_position,
        full_begin, full_end, scale, window, softcap,
        G, P, D, SLAB, BLOCK_D, TILE, WINDOW, SOFTCAP, EIGHT, MASKED=False,
    )  # fmt: skip
    acc, norm, top = _tiles(
        acc, norm, top, q, kv_ptr, factor_ptr, table_ptr, row_position, lowest, last_position,
        full_end, tile_end, scale, window, softcap,
        G, P, D, SLAB, BLOCK_D, TILE, WINDOW, SOFTCAP, EIGHT, MASKED=True,
    )  # fmt: skip
    return acc, norm, top


@triton.jit
def _tiles(
    acc,
    norm,
    top,
    q,
    kv_ptr,
    factor_ptr,
    table_ptr,
    row_position,
    lowest,
    last_position,
    begin,
    end,
    scale,
    window,
    softcap,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EIGHT: tl.constexpr,
    MASKED: tl.constexpr,
):
    # The table is read one tile ahead: the reads of K and V must not wait for it.
    block = _blocks(table_ptr, begin, end, lowest, last_position, P, TILE)
    for tile in range(begin, end):
        position = tile * TILE + tl.arange(0, TILE)
        # Only slots of the sequence that some row sees are read: others may hold NaN, and 0 * NaN is NaN.
        readable = (position >= lowest) & (position <= last_position)
        # 64 bits, for a layer's memory can pass 2^31 elements.
        slab = block.to(tl.int64) * (2 * G * SLAB)
        block = _blocks(table_ptr, tile + 1, end, lowest, last_position, P, TILE)
        d = tl.arange(0, BLOCK_D)
        at = (slab + (position % P) * D)[:, None] + d[None, :]
        factor_at = (slab + P * D) // 4 + position % P
        k = _load(kv_ptr + at, readable, d, D, BLOCK_D, MASKED)
        if EIGHT:
            k = k.to(tl.float32).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if EIGHT:
            score *= _factors(factor_ptr + factor_at, readable, MASKED)[None, :]
        if SOFTCAP:
            score = _softcap(score * scale, softcap) * LOG2E
        else:
            score *= scale * LOG2E
        if MASKED:
            seen = position[None, :] <= row_position[:, None]
            if WINDOW:
                seen &= position[None, :] > row_position[:, None] - window
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = higher
        if MASKED:
            # A row that has seen no key yet would subtract -inf from -inf.
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        norm = norm * shrink + tl.sum(weight, axis=1)
        v = _load(kv_ptr + G * SLAB + at, readable, d, D, BLOCK_D, MASKED)
        if EIGHT:
            v = v.to(tl.float32).to(q.dtype)
            weight *= _factors(factor_ptr + G * SLAB // 4 + factor_at, readable, MASKED)[None, :]
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, norm, top


@triton.jit
def _blocks(table_ptr, tile, end, lowest, last_position, P: tl.constexpr, TILE: tl.constexpr):
    """Block ids of a tile's keys: one for all of them where tiles divide blocks. Reads nothing at `end`."""
    if P % TILE == 0:
        block = tl.load(table_ptr + tile // (P // TILE), mask=tile < end, other=0)
    else:
        position = tile * TILE + tl.arange(0, TILE)
        mask = (position >= lowest) & (position <= last_position) & (tile < end)
        block = tl.load(table_ptr + position // P, mask=mask, other=0)
    return block


@triton.jit
def _load(at, readable, d, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    if MASKED and BLOCK_D != D:
        x = tl.load(at, mask=readable[:, None] & (d[None, :] < D), other=0.0)
    elif MASKED:
        x = tl.load(at, mask=readable[:, None], other=0.0)
    elif BLOCK_D != D:
        x = tl.load(at, mask=d[None, :] < D, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _factors(at, readable, MASKED: tl.constexpr):
    if MASKED:
        factor = tl.load(at, mask=readable, other=0.0)
    else:
        factor = tl.load(at)
    return factor


@triton.jit
def _softcap(x, cap):
    """cap * tanh(x / cap), by tanh(y) = 1 - 2 / (e^2y + 1), which is right at both infinities."""
    return cap - 2.0 * cap / (tl.exp2(x * (2.0 * LOG2E / cap)) + 1.0)
