"""Packed token masks in place: programs over blocks of each row that has one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


def mask_tokens(logits_SV: Tensor, words_KW: Tensor, row_K: Tensor) -> None:
    """Sets the logits of tokens whose bit is not set to -inf."""
    rows, words = words_KW.shape
    vocabulary = logits_SV.shape[1]
    _mask_tokens[(rows, triton.cdiv(vocabulary, BLOCK))](
        logits_SV, words_KW, row_K, V=vocabulary, W=words, BLOCK=BLOCK, num_warps=4
    )


@triton.jit
def _mask_tokens(logits_ptr, words_ptr, row_ptr, V: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + k)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words_ptr + k * W + v // 32, mask=v < V, other=0)
    banned = ((word >> (v % 32)) & 1) == 0
    tl.store(logits_ptr + row * V + v, float("-inf"), mask=banned & (v < V))
