"""The inputs of a decode step: one program per lane, which copies as much of a page table as is in use."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.types import DecodeInputs

BLOCK = 256


def decode_inputs(
    lanes_5S: Tensor, last_token_R: Tensor, page_table_RB: Tensor, block_size: int, out: DecodeInputs
) -> None:
    """Fills `out` and moves the lanes on by one position. `README.md` says what is what."""
    _decode_inputs[(lanes_5S.shape[1],)](
        lanes_5S,
        last_token_R,
        page_table_RB,
        out.token_id_S,
        out.position_S,
        out.slot_S,
        out.next_position_S,
        out.seq_len_S,
        out.page_table_SB,
        lanes_5S.stride(0),
        page_table_RB.stride(0),
        out.page_table_SB.stride(0),
        P=block_size,
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["lanes_stride", "table_stride", "out_table_stride"])
def _decode_inputs(
    lanes_ptr,
    last_token_ptr,
    table_ptr,
    token_ptr,
    position_ptr,
    slot_ptr,
    next_position_ptr,
    seq_len_ptr,
    out_table_ptr,
    lanes_stride,
    table_stride,
    out_table_stride,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(lanes_ptr + s)
    start = tl.load(lanes_ptr + lanes_stride + s)
    token = tl.load(lanes_ptr + 2 * lanes_stride + s)
    column = tl.load(lanes_ptr + 3 * lanes_stride + s)
    block = tl.load(lanes_ptr + 4 * lanes_stride + s)
    position, length = tl.maximum(start, 0), start + 1
    row_ptr = table_ptr + row * table_stride

    # The new entry is put in on the way: threads do not see what another one has just stored.
    last = tl.load(row_ptr + position // P).to(tl.int64)
    last = tl.where(column == position // P, block, last)
    slot = tl.where(start >= 0, last * P + position % P, -1)
    for first in range(0, tl.cdiv(length, P), BLOCK):
        b = first + tl.arange(0, BLOCK)
        inside = b < tl.cdiv(length, P)
        entry = tl.load(row_ptr + b, mask=inside)
        entry = tl.where(b == column, block.to(tl.int32), entry)
        tl.store(out_table_ptr + s * out_table_stride + b, entry, mask=inside)
    tl.store(row_ptr + column, block.to(tl.int32), mask=column >= 0)

    tl.store(token_ptr + s, tl.where(token >= 0, token, tl.load(last_token_ptr + row)))
    tl.store(position_ptr + s, position)
    tl.store(slot_ptr + s, slot)
    tl.store(next_position_ptr + s, length)
    tl.store(seq_len_ptr + s, length.to(tl.int32))
    # Every thread reads the lane by itself: none may still have to when the first one moves it on.
    tl.debug_barrier()
    tl.store(lanes_ptr + lanes_stride + s, tl.where(start >= 0, length, start))
    tl.store(lanes_ptr + 2 * lanes_stride + s, -1)
