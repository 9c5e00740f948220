"""Rotary position embedding, in place: `rotate_and_write` without norms, values and memory."""

from __future__ import annotations

from torch import Tensor

from kernels.rotate_and_write.triton import launch


def rotary(q_THD: Tensor, k_TGD: Tensor, cos_sin_MR: Tensor, position_T: Tensor) -> None:
    """Rotates the first R dims of each head."""
    launch(q_THD, k_TGD, None, (cos_sin_MR, position_T), None)
