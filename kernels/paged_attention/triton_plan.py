"""Decode's plan: which program reads which part of which context. Made on the device, once per step.

Contexts differ by orders of magnitude, so each sequence's tiles are cut into *parts* of about equal size, and
a program takes one (part, kv head). The cut depends on lengths that only the device knows, so a small kernel
makes it, and every layer with the same window uses it: the host, CUDA graphs and the layers stay out of it.

    lengths          9   2   5   (tiles)      chunk = 4
    parts            3   1   2
    ends             3   4   6                part 4 -> sequence 2, tiles [0, 3)

The chunk is a share of all contexts, which fills the device whatever the lengths. In deterministic mode it
follows from the sequence's own length, so that its sums are the same whatever else is in the batch.
"""
# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_attention.triton_config import DecodeConfig
from kernels.types import AttentionBatch

ITEMS_PER_PROGRAM = 64


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Work items, and the scratch that their layers use one after another.

    Attributes:
        work_W8: int32: sequence, first tile, tile after the last, the sequence's first item, its parts (0: an
            item too many). Rows of 8 for alignment.
        part_out_WHD, part_lse_WH: fp32 results of items that are not their sequence's only one.
        arrived_SG: int32, how many parts of a (sequence, kv head) are done; zero between launches.
    """

    work_W8: Tensor
    part_out_WHD: Tensor
    part_lse_WH: Tensor
    arrived_SG: Tensor


def most_parts(batch: AttentionBatch, groups: int, window: int, config: DecodeConfig) -> int:
    """An upper bound of the step's work items, from host bounds alone; `num_decodes` where nothing splits."""
    sequences, target = batch.num_decodes, triton.cdiv(config.target_programs, groups)
    longest = triton.cdiv(min(batch.max_seq_len, window or batch.max_seq_len), config.tile) + 1
    more = triton.cdiv(longest, config.min_chunk_tiles) - 1  # of one sequence
    if config.parts_by_own_length:
        return sequences * (1 + min(more, config.parts_by_own_length - 1))
    return sequences + min(target, sequences * more)


def plan(batch: AttentionBatch, heads: int, groups: int, head_dim: int, window: int, config: DecodeConfig):
    """The step's plan for layers of this shape, made when the first of them asks."""
    key = (heads, groups, head_dim, window, config)
    if key not in batch.plans:
        batch.plans[key] = _make_plan(batch, heads, groups, head_dim, window, config)
    return batch.plans[key]


def _make_plan(
    batch: AttentionBatch, heads: int, groups: int, head_dim: int, window: int, config: DecodeConfig
) -> DecodePlan:
    device, sequences = batch.seq_len_S.device, batch.num_decodes
    items = most_parts(batch, groups, window, config)
    made = DecodePlan(
        work_W8=torch.empty((items, 8), dtype=torch.int32, device=device),
        part_out_WHD=torch.empty((items, heads, head_dim), dtype=torch.float32, device=device),
        part_lse_WH=torch.empty((items, heads), dtype=torch.float32, device=device),
        arrived_SG=torch.zeros((sequences, groups), dtype=torch.int32, device=device),
    )
    _plan[(triton.cdiv(items, ITEMS_PER_PROGRAM),)](
        batch.seq_len_S,
        made.work_W8,
        sequences,
        items,
        triton.cdiv(config.target_programs, groups),
        window,
        # In powers of four: few kernels to compile, few idle lanes.
        BLOCK_S=max(64, 1 << (2 * triton.cdiv((sequences - 1).bit_length(), 2))),
        BLOCK_W=ITEMS_PER_PROGRAM,
        TILE=config.tile,
        MIN_CHUNK=config.min_chunk_tiles,
        OWN_PARTS=config.parts_by_own_length,
        WINDOW=window > 0,
        num_warps=8,
    )
    return made


@triton.jit(do_not_specialize=["sequences", "items", "target", "window"])
def _plan(
    seq_len_ptr,
    work_ptr,
    sequences,
    items,
    target,
    window,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    OWN_PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Each program cuts all contexts again, a scan of a few hundred integers, and writes its own items.

    Parts sum to at most `items`. An empty sequence has one part, which writes its zeros.
    """
    s = tl.arange(0, BLOCK_S)
    length = tl.load(seq_len_ptr + s, mask=s < sequences, other=0)
    first = tl.zeros((BLOCK_S,), tl.int32)
    if WINDOW:
        first = tl.maximum(length - window, 0) // TILE
    tiles = tl.cdiv(length, TILE) - first
    if OWN_PARTS:
        chunk = tl.maximum(tl.cdiv(tiles, OWN_PARTS), MIN_CHUNK)
    else:
        chunk = tl.maximum(tl.cdiv(tl.sum(tiles, axis=0), target), MIN_CHUNK)
    parts = tl.where(s < sequences, tl.maximum(tl.cdiv(tiles, chunk), 1), 0)
    ends = tl.cumsum(parts, axis=0)

    item = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    seq = tl.sum((ends[None, :] <= item[:, None]).to(tl.int32), axis=1)
    is_seq = s[None, :] == seq[:, None]
    item_parts = tl.sum(tl.where(is_seq, parts[None, :], 0), axis=1)
    first_item = tl.sum(tl.where(is_seq, (ends - parts)[None, :], 0), axis=1)
    seq_first = tl.sum(tl.where(is_seq, first[None, :], 0), axis=1)
    seq_tiles = tl.sum(tl.where(is_seq, tiles[None, :], 0), axis=1)
    part_tiles = tl.cdiv(seq_tiles, tl.maximum(item_parts, 1))
    begin = (item - first_item) * part_tiles
    at, inside = work_ptr + item * 8, item < items
    tl.store(at, seq, mask=inside)
    tl.store(at + 1, seq_first + begin, mask=inside)
    tl.store(at + 2, seq_first + tl.minimum(begin + part_tiles, seq_tiles), mask=inside)
    tl.store(at + 3, first_item, mask=inside)
    tl.store(at + 4, item_parts, mask=inside)
