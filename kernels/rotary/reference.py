"""Rotary position embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(q_THD: Tensor, k_TGD: Tensor, cos_sin_MR: Tensor, position_T: Tensor) -> None:
    """Rotates the pairs (i, i + R / 2) of every head of q and k in place by the angles of its position."""
    cos_T1, sin_T1 = cos_sin_MR[position_T][:, None].chunk(2, dim=-1)
    half = cos_T1.shape[-1]
    for x_THD in (q_THD, k_TGD):
        a, b = x_THD[..., :half].float(), x_THD[..., half : 2 * half].float()
        rotated = torch.cat((a * cos_T1 - b * sin_T1, b * cos_T1 + a * sin_T1), dim=-1)
        x_THD[..., : 2 * half] = rotated.to(x_THD.dtype)
