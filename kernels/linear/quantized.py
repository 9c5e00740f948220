"""Weights in integers of 8 or 4 bits, and bf16 ones as 12 bits: choosing them, undoing it, and the products.

The native library multiplies integers with integers (`kernels/native/linear_quantized.h`). Without it, and
for sizes it does not take, plain torch turns a few rows of the weight back into floats at a time: small, and
slow.

Shapes: `O` outputs, `I` inputs, `G` groups along the inputs, `J` inputs of one group.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import fp8
from kernels.native import library as native
from kernels.native.library import DTYPE_CODE, library
from kernels.types import PackedLinear, QuantizedWeight

PANEL = 64  # outputs per panel of the native library
_ROUNDED_GROUP = 64  # inputs that share a scale where bf16 becomes integers
_PIECE = 256  # inputs that it sums at a time at most
_CHUNK = 1 << 18  # elements in floats at a time
_INT4_REACH = 8.3  # steps from zero to the largest weight of a group; between the best for 32 and for 128
_LEAST_HALF = torch.finfo(torch.float16).tiny  # from here on fp16 has all its bits
_TINY = 1e-30  # keeps a scale of all-zero weights from dividing by zero


def quantize(weight_OI: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Rounds a weight to integers, symmetric around zero.

    8 bits use -127 to 127. 4 bits use -8 to 7, with a scale whose sign lets the largest weight of a group be
    -8, clipped a little, then fitted to the rounded values by least squares: 13 % less error on normally
    distributed weights than the largest over 7. Such a scale is one that fp16 has, in the reach of fp16.

    Args:
        bits: 8 or 4.
        group_size: inputs that share a scale; 0 is all of an output's.
    """
    outputs, inputs = weight_OI.shape
    size = group_size or inputs
    if bits not in (4, 8) or inputs % size:
        raise ValueError(f"{bits} bits in groups of {size} do not fit {inputs} inputs")
    value_OI = torch.empty(outputs, inputs, dtype=torch.int8, device=weight_OI.device)
    scale_OG = torch.empty(outputs, inputs // size, dtype=torch.float32, device=weight_OI.device)
    lib = library() if weight_OI.device.type == "cpu" and weight_OI.dtype in DTYPE_CODE else None
    if lib is not None:
        weight_OI = weight_OI.contiguous()
        lib.quire_quantize_weights(
            DTYPE_CODE[weight_OI.dtype], bits, weight_OI.data_ptr(), value_OI.data_ptr(),
            scale_OG.data_ptr(), outputs, inputs, size,
        )  # fmt: skip
        return QuantizedWeight(bits, value_OI, scale_OG)
    choose = _choose_int8 if bits == 8 else _choose_int4
    for rows in _row_chunks(outputs, inputs):
        weight_OGJ = weight_OI[rows].float().view(-1, inputs // size, size)
        value_OGJ, scale_OG[rows] = choose(weight_OGJ)
        value_OI[rows] = value_OGJ.flatten(1)
    return QuantizedWeight(bits, value_OI, scale_OG)


def dequantize(w: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[O, I]` that the integers stand for, its inputs in their own order."""
    weight_OI = torch.empty(w.value_OI.shape, dtype=dtype, device=w.value_OI.device)
    for rows in _row_chunks(*w.value_OI.shape):
        zero_OG = None if w.zero_OG is None else w.zero_OG[rows]
        part_OI = _floats(w.value_OI[rows], w.scale_OG[rows], zero_OG).to(dtype)
        if w.order_I is None:
            weight_OI[rows] = part_OI
        else:
            weight_OI[rows, w.order_I] = part_OI
    return weight_OI


def pack_quantized(
    w: QuantizedWeight, bias_O: Tensor | None, dtype: torch.dtype, deterministic: bool = False
) -> PackedLinear:
    """Packs a quantised weight for inputs of `dtype`. The caller may drop the original.

    Args:
        deterministic: as in `pack_linear`.
    """
    outputs, inputs = w.value_OI.shape
    if w.value_OI.is_cuda:
        if not deterministic and fp8.multiplies(w, dtype):
            return fp8.pack(w, bias_O)
        if launchers().step_of(inputs, w.scale_OG.shape[1]):
            packed: PackedLinear = launchers().pack(w, bias_O, deterministic)
            return packed
    if _is_native(w, dtype):
        values, zero = _pack_native(w), None if w.zero_OG is None else _in_panels(w.zero_OG)
        scale = _in_panels(_narrow(w.scale_OG))
        return PackedLinear(
            "native_quantized", values, bias_O, outputs, inputs, w.bits, scale, zero, w.order_I
        )
    values = _pack_nibbles(w.value_OI) if w.bits == 4 else w.value_OI
    return PackedLinear(
        "quantized", values, bias_O, outputs, inputs, w.bits, w.scale_OG, w.zero_OG, w.order_I
    )


def launchers() -> Any:
    """The Triton launchers, imported when the first weight on a GPU asks."""
    return importlib.import_module("kernels.linear.triton")


def rounds_bf16(weight_OI: Tensor) -> bool:
    """Whether a bf16 weight becomes integers: the processor has no products of bf16, and groups are whole."""
    return (
        weight_OI.dtype == torch.bfloat16
        and not native.multiplies_bf16()
        and weight_OI.shape[1] % _ROUNDED_GROUP == 0
    )


def pack_rounded(weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear | None:
    """Packs a bf16 weight as 12-bit integers, with a power of two for every 64 inputs of an output.

    A weight down to an eighth of its group's largest is exact; smaller ones are off by a 2048th of the
    largest at most. None where a weight is not finite, which integers cannot be.
    """
    lib = library()
    assert lib is not None
    weight_OI = weight_OI.contiguous()
    outputs, inputs = weight_OI.shape
    panels, groups = -(-outputs // PANEL), inputs // _ROUNDED_GROUP
    packed = torch.empty((panels * PANEL, inputs * 12 // 32), dtype=torch.int32)
    scale = torch.empty((panels, groups, PANEL), dtype=torch.bfloat16)
    lib.quire_round_bf16(
        weight_OI.data_ptr(), packed.data_ptr(), scale.data_ptr(), outputs, inputs, _ROUNDED_GROUP
    )
    if not scale.isfinite().all():
        return None
    return PackedLinear("native_quantized", packed, bias_O, outputs, inputs, 12, scale)


def linear_quantized(x_TI: Tensor, packed: PackedLinear) -> Tensor:
    """`x @ weight.T + bias` for weights that `pack_quantized` packed."""
    if packed.order_I is not None:
        x_TI = x_TI[:, packed.order_I]
    return _linear_native(x_TI, packed) if packed.kind == "native_quantized" else _linear_torch(x_TI, packed)


def _is_native(w: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether the library takes it: whole words in every group, and groups that pieces of 256 inputs fill."""
    if (
        library() is None
        or w.value_OI.device.type != "cpu"
        or w.value_OI.dtype != torch.int8
        or dtype not in DTYPE_CODE
        or w.value_OI.numel() == 0
    ):
        return False
    group = w.value_OI.shape[1] // w.scale_OG.shape[1]
    pieces = group <= _PIECE or group % _PIECE == 0 or w.scale_OG.shape[1] == 1
    return pieces and group % (32 // w.bits) == 0


def _pack_native(w: QuantizedWeight) -> Tensor:
    lib = library()
    assert lib is not None
    value_OI = w.value_OI.contiguous()
    outputs, inputs = value_OI.shape
    packed = torch.empty((-(-outputs // PANEL) * PANEL, inputs * w.bits // 32), dtype=torch.int32)
    lib.quire_pack_quantized(w.bits, value_OI.data_ptr(), packed.data_ptr(), outputs, inputs)
    return packed


def _narrow(scale_OG: Tensor) -> Tensor:
    """Scales in 16 bits, where that loses nothing: those of checkpoints came in 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        if scale_OG.to(dtype).float().equal(scale_OG):
            return scale_OG.to(dtype)
    return scale_OG


def _in_panels(x_OG: Tensor) -> Tensor:
    """`[panels, G, 64]`, zeros after the last output."""
    outputs, groups = x_OG.shape
    padded = F.pad(x_OG, (0, 0, 0, -outputs % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def _linear_native(x_TI: Tensor, packed: PackedLinear) -> Tensor:
    lib = library()
    scale, zero, bias_O = packed.scale_OG, packed.zero_OG, packed.bias_O
    if lib is None or scale is None or (bias_O is not None and bias_O.dtype != x_TI.dtype):
        raise ValueError(
            f"{x_TI.dtype} input for a weight packed for another dtype, or for the native library"
        )
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    y_TO = torch.empty((x_TI.shape[0], packed.outputs), dtype=x_TI.dtype)
    lib.quire_linear_quantized(
        DTYPE_CODE[x_TI.dtype], x_TI.data_ptr(), packed.weight.data_ptr(), scale.data_ptr(),
        None if zero is None else zero.data_ptr(), None if bias_O is None else bias_O.data_ptr(),
        y_TO.data_ptr(), x_TI.shape[0], packed.inputs, packed.outputs, x_TI.stride(0),
        packed.inputs // scale.shape[1], packed.bits, DTYPE_CODE[scale.dtype],
    )  # fmt: skip
    return y_TO


def _linear_torch(x_TI: Tensor, packed: PackedLinear) -> Tensor:
    assert packed.scale_OG is not None
    # fp16 products are slow on a CPU (linear.py).
    dtype = torch.float32 if x_TI.dtype == torch.float16 and not x_TI.is_cuda else x_TI.dtype
    wide_TI = x_TI.to(dtype)
    y_TO = x_TI.new_empty((x_TI.shape[0], packed.outputs))
    for rows in _row_chunks(packed.outputs, packed.inputs):
        values = packed.weight[rows]
        value_OI = _unpack_nibbles(values, packed.inputs) if packed.bits == 4 else values
        zero_OG = None if packed.zero_OG is None else packed.zero_OG[rows]
        weight_OI = _floats(value_OI, packed.scale_OG[rows], zero_OG).to(dtype)
        bias_O = None if packed.bias_O is None else packed.bias_O[rows].to(dtype)
        y_TO[:, rows] = F.linear(wide_TI, weight_OI, bias_O)
    return y_TO


def _row_chunks(outputs: int, inputs: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, inputs))
    return (slice(at, min(at + step, outputs)) for at in range(0, outputs, step))


def _choose_int8(weight_OGJ: Tensor) -> tuple[Tensor, Tensor]:
    scale_OG = weight_OGJ.abs().amax(-1).clamp_(min=_TINY).div_(127)
    value_OGJ = (weight_OGJ / scale_OG.unsqueeze(-1)).round_()
    return value_OGJ.to(torch.int8), scale_OG


def _choose_int4(weight_OGJ: Tensor) -> tuple[Tensor, Tensor]:
    high_OG, low_OG = weight_OGJ.amax(-1), weight_OGJ.amin(-1)
    largest_OG = torch.where(high_OG > -low_OG, high_OG, low_OG)
    scale_OG = torch.where(largest_OG.abs() < _TINY, _TINY, largest_OG / -_INT4_REACH)
    value_OGJ = (weight_OGJ / scale_OG.unsqueeze(-1)).round_().clamp_(-8, 7)
    fitted_OG = (weight_OGJ * value_OGJ).sum(-1) / value_OGJ.square().sum(-1).clamp_(min=1)
    return value_OGJ.to(torch.int8), _as_half(torch.where(fitted_OG == 0, scale_OG, fitted_OG))


def _as_half(scale_OG: Tensor) -> Tensor:
    fits = (scale_OG.abs() >= _LEAST_HALF) & (scale_OG.abs() <= torch.finfo(torch.float16).max)
    return torch.where(fits, scale_OG.half().float(), scale_OG)


def _floats(value_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None) -> Tensor:
    """fp32 `[O, I]`, columns as stored."""
    value_OGJ = value_OI.float().view(*scale_OG.shape, -1)
    if zero_OG is not None:
        value_OGJ -= zero_OG.unsqueeze(-1)
    return (value_OGJ * scale_OG.unsqueeze(-1)).flatten(1)


def _pack_nibbles(value_OI: Tensor) -> Tensor:
    """Two neighbours per byte, the first in the low half; an odd last column is followed by zero."""
    if value_OI.shape[1] % 2:
        value_OI = F.pad(value_OI, (0, 1))
    return (value_OI[:, ::2] & 15) | (value_OI[:, 1::2] << 4)


def _unpack_nibbles(packed: Tensor, inputs: int) -> Tensor:
    # Shifting up and down again extends the sign.
    pairs = torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1)
    return pairs.flatten(1)[:, :inputs]
