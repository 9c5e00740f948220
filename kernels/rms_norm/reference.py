"""RMS normalisation, with the residual sum before it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual_TE: Tensor | None = None,
) -> Tensor:
    """Returns `x / rms(x) * (weight + offset)`, computed in fp32 and rounded once.

    With a residual, `residual += x` first, in place and in its dtype, and what is normalised is the sum as
    stored: fusing the two changes no bit.
    """
    if residual_TE is not None:
        x_TE = residual_TE.add_(x_TE)
    x_fp32_TE = x_TE.float()
    scale_T1 = torch.rsqrt(x_fp32_TE.square().mean(-1, keepdim=True) + eps)
    return (x_fp32_TE * scale_T1 * (weight_E.float() + offset)).to(x_TE.dtype)
