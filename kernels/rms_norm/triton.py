"""RMS normalisation with the residual sum: whole rows per program, several where rows are short."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(
    x_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual_TE: Tensor | None = None,
) -> Tensor:
    """Normalises the rows of `[T, E]`, or of `[T, H, E]` with any strides but the last."""
    y_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)
    width = x_TE.shape[-1]
    rows = y_TE.numel() // width
    if not rows:
        return y_TE
    block = triton.next_power_of_2(width)
    rows_per_program = max(1, 1024 // block)
    _rms_norm[(triton.cdiv(rows, rows_per_program),)](
        x_TE,
        weight_E,
        y_TE,
        residual_TE if residual_TE is not None else y_TE,
        x_TE.stride(0),
        x_TE.stride(1) if x_TE.dim() == 3 else 0,
        rows,
        eps,
        offset,
        HEADS=x_TE.shape[1] if x_TE.dim() == 3 else 1,
        E=width,
        BLOCK=block,
        ROWS=rows_per_program,
        RESIDUAL=residual_TE is not None,
        num_warps=max(2, min(16, block * rows_per_program // 512)),
    )
    return y_TE


@triton.jit(do_not_specialize=["rows", "eps", "offset"])
def _rms_norm(
    x_ptr,
    weight_ptr,
    y_ptr,
    residual_ptr,
    stride_t,
    stride_h,
    rows,
    eps,
    offset,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    e = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (e < E)
    x = tl.load(x_ptr + (row // HEADS) * stride_t + (row % HEADS) * stride_h + e, mask=mask, other=0.0)
    if RESIDUAL:
        total = x.to(tl.float32) + tl.load(residual_ptr + row * E + e, mask=mask, other=0.0).to(tl.float32)
        x = total.to(x_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * E + e, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / E + eps)
    weight = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + row * E + e, (x * scale[:, None] * weight).to(y_ptr.dtype.element_ty), mask=mask)
