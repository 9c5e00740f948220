"""Log probabilities of drawn and of likeliest tokens, without a log-softmax of the whole row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def logprobs(logits_SV: Tensor, token_S: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the log probability of each row's token, and the `top` likeliest ids with theirs."""
    rows, vocabulary = logits_SV.shape
    norm_S = torch.empty(rows, dtype=torch.float32, device=logits_SV.device)
    chosen_S = torch.empty_like(norm_S)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(vocabulary))
        _logprobs[(rows,)](logits_SV, token_S, norm_S, chosen_S, V=vocabulary, BLOCK=block, num_warps=16)
    if not top:
        return chosen_S, token_S.new_empty((rows, 0)), norm_S.new_empty((rows, 0))
    top_SK, top_ids_SK = torch.topk(logits_SV, top, dim=-1)
    return chosen_S, top_ids_SK, top_SK - norm_S[:, None]


@triton.jit
def _logprobs(logits_ptr, token_ptr, norm_ptr, chosen_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + s * V
    # Each lane keeps its own running maximum and sum, so that lanes meet once, after the loop.
    v = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        x = tl.load(row_ptr + start + v, mask=start + v < V, other=float("-inf"))
        higher = tl.maximum(top, x)
        # A lane that has seen nothing but -inf would subtract it from itself.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = higher
    highest = tl.max(top, axis=0)
    norm = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    tl.store(norm_ptr + s, norm)
    tl.store(chosen_ptr + s, tl.load(row_ptr + tl.load(token_ptr + s)) - norm)
