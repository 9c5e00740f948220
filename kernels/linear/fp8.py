"""Weights and inputs both in fp8 (e4m3): a scale for each output of the weight and for each token.

torch multiplies them on GPUs with such tensor cores (compute capability 9.0 and up); elsewhere the
weight-only kernels of `triton.py` widen the weight in registers. Results are bf16, which is what torch
offers.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from kernels.types import PackedLinear, QuantizedWeight

_MULTIPLE = 16  # what the tensor cores want sizes to be
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def multiplies(w: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether this weight, on this device, is multiplied with inputs in fp8."""
    return (
        w.value_OI.dtype == torch.float8_e4m3fn
        and dtype == torch.bfloat16
        and w.scale_OG.shape[1] == 1
        and all(size % _MULTIPLE == 0 for size in w.value_OI.shape)
        and torch.cuda.get_device_capability(w.value_OI.device) >= (9, 0)
    )


def pack(w: QuantizedWeight, bias_O: Tensor | None) -> PackedLinear:
    """Keeps the weight as it is: rows of inputs are what the product wants."""
    outputs, inputs = w.value_OI.shape
    scale_GO = w.scale_OG.t().contiguous()
    return PackedLinear("fp8", w.value_OI.contiguous(), bias_O, outputs, inputs, 8, scale_GO)


def linear_fp8(x_TI: Tensor, packed: PackedLinear) -> Tensor:
    """`x @ weight.T + bias`, x rounded to fp8 token by token."""
    assert packed.scale_OG is not None
    value_TI, scale_T1 = round_rows(x_TI)
    y_TO: Tensor = torch._scaled_mm(
        value_TI, packed.weight.t(), scale_a=scale_T1, scale_b=packed.scale_OG, bias=packed.bias_O,
        out_dtype=torch.bfloat16,
    )  # fmt: skip
    return y_TO


def round_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 values, and fp32 scales `[T, 1]`: a row's largest magnitude becomes the largest of fp8."""
    if x_TI.is_cuda:
        value_TI, scale_T1 = importlib.import_module("kernels.linear.triton_round").round_rows(x_TI)
        return value_TI, scale_T1
    scale_T1 = x_TI.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x_TI.float() / scale_T1).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale_T1
