"""The CPU backend of `rms_norm`: one pass over each row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native.library import DTYPE_CODE, library

from . import reference


def rms_norm(
    x_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual_TE: Tensor | None = None,
) -> Tensor:
    """See `kernels.api.rms_norm`. x may also be `[T, H, E]` with any strides but the last."""
    lib = library()
    code = DTYPE_CODE.get(x_TE.dtype)
    if lib is None or code is None or weight_E.dtype != x_TE.dtype:
        return reference.rms_norm(x_TE, weight_E, eps, offset=offset, residual_TE=residual_TE)
    y_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype)
    if x_TE.dim() == 3:
        rows, inner, size = x_TE.shape
        stride, inner_stride, _ = x_TE.stride()
    else:
        rows, size = x_TE.shape
        stride, inner, inner_stride = x_TE.stride(0), 1, 0
    lib.quire_rms_norm(
        code, x_TE.data_ptr(), weight_E.data_ptr(), None if residual_TE is None else residual_TE.data_ptr(),
        y_TE.data_ptr(), rows * inner, inner, size, stride, inner_stride, eps, offset,
    )  # fmt: skip
    return y_TE
