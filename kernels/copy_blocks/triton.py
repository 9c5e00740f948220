"""Copies whole KV blocks: a block is contiguous, so its programs are plain memory copies."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


def copy_blocks(kv_N2GPD: Tensor, src_: Tensor, dst_: Tensor) -> None:
    """Copies block `src_[i]` to block `dst_[i]`."""
    block_elements = kv_N2GPD.stride(0)
    grid = (src_.shape[0], triton.cdiv(block_elements, BLOCK))
    _copy_blocks[grid](kv_N2GPD, src_, dst_, SIZE=block_elements, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _copy_blocks(kv_ptr, src_ptr, dst_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    src = tl.load(src_ptr + tl.program_id(0))
    dst = tl.load(dst_ptr + tl.program_id(0))
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < SIZE
    x = tl.load(kv_ptr + src * SIZE + i, mask=mask)
    tl.store(kv_ptr + dst * SIZE + i, x, mask=mask)
