"""Checkpoints in the formats that quantised weights come in, and the floats that they stand for.

    writer = WRITERS["gptq-order"]
    write_quantized(source, folder / "quantised", writer)  # as a quantiser would leave it
    write_dequantized(source, folder / "floats", writer)   # the same weights in fp32

Written from the formats' descriptions, value by value, and sharing nothing with what reads them. Rounding
is to nearest: what matters here is where each bit goes, not quality.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight$")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """`weight[:, i] = (value[:, i] - zero[:, group[i]]) * scale[:, group[i]]`, with unsigned integers."""

    bits: int
    value: Tensor
    zero: Tensor
    scale: Tensor
    group: Tensor

    @property
    def weight(self) -> Tensor:
        group = self.group
        return (self.value - self.zero[:, group]).float() * self.scale[:, group].float()


Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How to round, and how to write what was rounded."""

    tensors: Callable[[Rounded], Tensors]
    config: Mapping[str, Any]
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    ordered: bool = False
    scale_dtype: torch.dtype = torch.float16
    left_alone: str = field(default="", repr=False)  # modules whose name has this stay in floats


def round_weight(weight: Tensor, writer: Writer, seed: int) -> Rounded:
    outputs, inputs = weight.shape
    size = writer.group_size or inputs
    order = torch.arange(inputs)
    if writer.ordered:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))
    grouped = weight.float()[:, order].view(outputs, -1, size)
    top = 2**writer.bits - 1
    if writer.symmetric:
        scale = grouped.abs().amax(-1) / (top // 2)
        zero = torch.full_like(scale, top // 2 + 1)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(0, top)
    scale = scale.to(writer.scale_dtype)
    value = (grouped / scale.float()[..., None]).round() + zero[..., None]
    in_order = torch.empty(outputs, inputs)
    in_order[:, order] = value.clamp(0, top).view(outputs, inputs)
    group = torch.empty(inputs, dtype=torch.int32)
    group[order] = (torch.arange(inputs) // size).int()
    return Rounded(bits=writer.bits, value=in_order.int(), zero=zero.int(), scale=scale, group=group)


def pack_words(values: Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words along `axis`; value `order[i]` of a word at bit `i * bits`."""
    per_word = 32 // bits
    rows = values.long() if axis == 1 else values.long().t()
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % per_word))
    words = torch.zeros(rows.shape[0], rows.shape[1] // per_word, dtype=torch.int64)
    for i in range(per_word):
        words |= rows[:, (order[i] if order else i) :: per_word] << (bits * i)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    return (words if axis == 1 else words.t()).contiguous()


def gptq(less_one: bool) -> Callable[[Rounded], Tensors]:
    def write(w: Rounded) -> Tensors:
        zeros = pack_words(w.zero.t(), w.bits, 1)
        ones = sum(1 << (w.bits * i) for i in range(32 // w.bits))
        return {
            "qweight": pack_words(w.value.t(), w.bits, 0),
            "qzeros": zeros - ones if less_one else zeros,
            "scales": w.scale.t().contiguous(),
            "g_idx": w.group,
        }

    return write


def awq(w: Rounded) -> Tensors:
    return {
        "qweight": pack_words(w.value.t(), 4, 1, AWQ_ORDER),
        "qzeros": pack_words(w.zero.t(), 4, 1, AWQ_ORDER),
        "scales": w.scale.t().contiguous(),
    }


def packed(w: Rounded) -> Tensors:
    """compressed-tensors writes signed values raised by half their range: the unsigned ones."""
    tensors = {
        "weight_packed": pack_words(w.value, w.bits, 1),
        "weight_scale": w.scale,
        "weight_shape": torch.tensor(w.value.shape),
    }
    if (w.zero != 2 ** (w.bits - 1)).any():
        tensors["weight_zero_point"] = pack_words(w.zero, w.bits, 0)
    if not w.group.equal(w.group.sort().values):
        tensors["weight_g_idx"] = w.group
    return tensors


def integers(w: Rounded) -> Tensors:
    tensors = {"weight": (w.value - 128).to(torch.int8), "weight_scale": w.scale}
    if (w.zero != 128).any():
        tensors["weight_zero_point"] = (w.zero - 128).to(torch.int8)
    return tensors


def _gptq(bits: int = 4, *, v2: bool = False, **how: Any) -> Writer:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": how.get("group_size", 32) or -1,
        "sym": how.get("symmetric", True),
        "desc_act": how.get("ordered", False),
        **({"checkpoint_format": "gptq_v2"} if v2 else {}),
    }
    return Writer(tensors=gptq(less_one=not v2), config=config, bits=bits, **how)


def _compressed(tensors: Callable[[Rounded], Tensors], format: str, bits: int, **how: Any) -> Writer:
    size = how.get("group_size", 32)
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": how.get("symmetric", True),
        "strategy": "group" if size else "channel",
        "group_size": size or None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    how = {"scale_dtype": torch.bfloat16, **how}
    return Writer(tensors=tensors, config=config, bits=bits, **how)


_AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

WRITERS: dict[str, Writer] = {
    "gptq": _gptq(),
    "gptq-8-channel": _gptq(8, group_size=0),
    "gptq-asym": _gptq(symmetric=False),
    "gptq-asym-8": _gptq(8, symmetric=False, v2=True),
    "gptq-order": _gptq(ordered=True),
    "gptq-v2-asym-order": _gptq(symmetric=False, ordered=True, v2=True),
    "awq": Writer(tensors=awq, config=_AWQ_CONFIG, symmetric=False),
    "packed": _compressed(packed, "pack-quantized", 4),
    "packed-8": _compressed(packed, "pack-quantized", 8),
    "packed-asym": _compressed(packed, "pack-quantized", 4, symmetric=False),
    "packed-order": _compressed(packed, "pack-quantized", 4, ordered=True),
    "packed-channel": _compressed(packed, "pack-quantized", 8, group_size=0, symmetric=False),
    "packed-mixed": _compressed(packed, "pack-quantized", 4, left_alone="k_proj"),
    "ints": _compressed(integers, "int-quantized", 8, group_size=0),
    "ints-asym": _compressed(integers, "int-quantized", 8, group_size=0, symmetric=False),
}


def write_quantized(source: Path, target: Path, writer: Writer) -> Path:
    """`source` as a quantiser would leave it."""
    tensors: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if _is_quantized(name, writer):
            rounded = round_weight(weight, writer, _seed(name))
            stem = name.removesuffix(".weight")
            tensors.update({f"{stem}.{role}": x for role, x in writer.tensors(rounded).items()})
        else:
            tensors[name] = weight
    return _write(source, target, tensors, quantization_config=dict(writer.config))


def write_dequantized(source: Path, target: Path, writer: Writer) -> Path:
    """`source` with the weights that the quantised one stands for, in fp32."""
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if _is_quantized(name, writer):
            tensors[name] = round_weight(weight, writer, _seed(name)).weight
    return _write(source, target, tensors)


def _is_quantized(name: str, writer: Writer) -> bool:
    alone = bool(writer.left_alone) and writer.left_alone in name
    return LINEAR.search(name) is not None and not alone


def _seed(name: str) -> int:
    """The parts of a fused slot see the same inputs, and so are quantised in the same order."""
    return len(re.sub(r"(q|k|v|gate|up)_proj", "", name))


def _write(source: Path, target: Path, tensors: Tensors, **config: Any) -> Path:
    shutil.copytree(source, target)
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target
