"""Repetition, frequency and presence penalties in place: programs over blocks of each row that asks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.types import PenaltyParams

BLOCK = 2048


def penalize(logits_SV: Tensor, params: PenaltyParams) -> None:
    """Changes the logits of tokens already seen; rows with `row_S == -1` stay as they are."""
    rows, vocabulary = logits_SV.shape
    _penalize[(rows, triton.cdiv(vocabulary, BLOCK))](
        logits_SV,
        params.row_S,
        params.output_count_UV,
        params.prompt_seen_UV.view(torch.uint8),
        params.presence_S,
        params.frequency_S,
        params.repetition_S,
        V=vocabulary,
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit
def _penalize(
    logits_ptr,
    row_ptr,
    count_ptr,
    prompt_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + s)
    if row < 0:
        return
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = v < V
    x = tl.load(logits_ptr + s * V + v, mask=mask)
    count = tl.load(count_ptr + row * V + v, mask=mask, other=0)
    prompt = tl.load(prompt_ptr + row * V + v, mask=mask, other=0)
    repetition = tl.load(repetition_ptr + s)
    repeated = tl.where(x > 0, x / repetition, x * repetition)
    x = tl.where((count > 0) | (prompt != 0), repeated, x)
    x -= tl.load(frequency_ptr + s) * count.to(tl.float32)
    x -= tl.where(count > 0, tl.load(presence_ptr + s), 0.0)
    tl.store(logits_ptr + s * V + v, x, mask=mask)
