"""Linear layers over a weight packed once, when it is loaded.

Chosen per weight by `pack_linear`; weights in 8 and 4 bits are packed by `quantized.py`:
- `native`: panels of 64 outputs for the CPU library (`kernels/native/linear.h`), any dtype. bf16 on a
  processor that does not multiply it becomes 12-bit integers: 1.4 times as fast as widening it to fp32.
- `onednn`: torch's own packed format. Without the library, and for bf16 on processors with AMX, which the
  library does not use.
- `plain`: the weight as it came. cuBLAS on CUDA, and whatever the others do not take.
- `triton`: on CUDA, what must be summed in a fixed order, and weights in 8 and 4 bits (`triton.py`).
- `fp8`: on CUDA, weights and inputs in fp8 (`fp8.py`).

fp16 is never multiplied in fp16 on a CPU, where that is ten times slower than fp32: the library widens on the
fly; without it the weight is packed as fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear.fp8 import linear_fp8
from kernels.linear.quantized import PANEL, launchers, linear_quantized, pack_rounded, rounds_bf16
from kernels.native.library import DTYPE_CODE, library
from kernels.types import PackedLinear


def pack_linear(weight_OI: Tensor, bias_O: Tensor | None, deterministic: bool = False) -> PackedLinear:
    """Packs a weight. On a CPU the result is a copy: the caller may keep the original or drop it.

    Args:
        deterministic: a row's result has the same bits whatever rows are beside it. The native library's
            always has; on CUDA it costs speed.
    """
    if deterministic and weight_OI.is_cuda:
        fixed: PackedLinear = launchers().pack_16_bits(weight_OI, bias_O)
        return fixed
    kind = _kind(weight_OI, deterministic)
    outputs, inputs = weight_OI.shape
    rounded = pack_rounded(weight_OI, bias_O) if kind == "native" and rounds_bf16(weight_OI) else None
    if rounded is not None:
        return rounded
    if kind == "native":
        return PackedLinear(kind, _pack_native(weight_OI.contiguous()), bias_O, outputs, inputs)
    if kind == "onednn":
        wide = weight_OI.float() if weight_OI.dtype == torch.float16 else weight_OI
        bias_O = bias_O.to(wide.dtype) if bias_O is not None else None
        # The hint tunes the order for that many rows; any number of rows is right with it.
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(wide.contiguous(), 16)
        return PackedLinear(kind, packed, bias_O, outputs, inputs)
    return PackedLinear(kind, weight_OI, bias_O, outputs, inputs)


def linear(x_TI: Tensor, packed: PackedLinear) -> Tensor:
    """Returns `x @ weight.T + bias`, `[T, O]`; sums in fp32 whatever the dtype."""
    y_TO: Tensor
    if x_TI.shape[1] != packed.inputs:
        raise ValueError(f"{x_TI.shape[1]} inputs for a weight of {packed.inputs}")
    if packed.kind == "native":
        return _linear_native(x_TI, packed)
    if packed.kind == "onednn":
        wide_TI = x_TI.to(packed.weight.dtype)
        y_TO = torch.ops.mkldnn._linear_pointwise(wide_TI, packed.weight, packed.bias_O, "none", [], "")
        return y_TO.to(x_TI.dtype)
    if packed.kind in ("quantized", "native_quantized"):
        return linear_quantized(x_TI, packed)
    if packed.kind == "triton":
        y_TO = launchers().linear(x_TI, packed)
        return y_TO
    if packed.kind == "fp8":
        return linear_fp8(x_TI, packed)
    return F.linear(x_TI, packed.weight, packed.bias_O)


def _kind(weight_OI: Tensor, deterministic: bool = False) -> Literal["native", "onednn", "plain"]:
    dtype = weight_OI.dtype
    if weight_OI.is_cuda or dtype not in DTYPE_CODE or weight_OI.numel() == 0:
        return "plain"
    amx = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and not deterministic
    if library() is not None and not amx and weight_OI.shape[1] % _interleave(dtype) == 0:
        return "native"
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype == torch.bfloat16:
        onednn = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "onednn" if onednn else "plain"


def _interleave(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def _pack_native(weight_OI: Tensor) -> Tensor:
    lib = library()
    assert lib is not None
    outputs, inputs = weight_OI.shape
    packed = torch.empty((-(-outputs // PANEL) * PANEL, inputs), dtype=weight_OI.dtype)
    code = DTYPE_CODE[weight_OI.dtype]
    lib.quire_pack_linear(code, weight_OI.data_ptr(), packed.data_ptr(), outputs, inputs)
    return packed


def _linear_native(x_TI: Tensor, packed: PackedLinear) -> Tensor:
    lib = library()
    weight, bias_O = packed.weight, packed.bias_O
    if lib is None or x_TI.dtype != weight.dtype or (bias_O is not None and bias_O.dtype != weight.dtype):
        raise ValueError(f"{x_TI.dtype} input for a {weight.dtype} weight packed for the native library")
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    rows, inputs = x_TI.shape
    y_TO = torch.empty((rows, packed.outputs), dtype=x_TI.dtype)
    lib.quire_linear(
        DTYPE_CODE[x_TI.dtype], x_TI.data_ptr(), weight.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(), y_TO.data_ptr(),
        rows, inputs, packed.outputs, x_TI.stride(0),
    )  # fmt: skip
    return y_TO
