"""Packed token masks in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_tokens(logits_SV: Tensor, words_KW: Tensor, row_K: Tensor) -> None:
    """Sets the logits of tokens whose bit is not set to -inf, in place."""
    vocabulary = logits_SV.shape[1]
    bit_32 = torch.arange(32, dtype=torch.int32, device=words_KW.device)
    allowed_KV = ((words_KW[:, :, None] >> bit_32) & 1).bool().flatten(1)[:, :vocabulary]
    logits_SV[row_K] = logits_SV[row_K].masked_fill(~allowed_KV, -torch.inf)
