"""compressed-tensors: what llm-compressor writes.

- pack-quantized: `weight_packed` int32 `[O, I / n]`, n values a word; `weight_scale` `[O, G]`;
  `weight_zero_point` int32 `[O / n, G]` where asymmetric; `weight_g_idx` int32 `[I]` where inputs were
  quantised by importance.
- int-quantized: `weight` int8, `weight_scale`, `weight_zero_point` int8 where asymmetric. Activations stay in
  the compute dtype, whatever the config would have them rounded to.
- float-quantized: `weight` fp8 and `weight_scale`.

Which modules are quantised, with how many bits and in which groups is seen from the tensors, so that `ignore`
and several `config_groups` need no reading.

Source: https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.model.headers import TensorInfo
from engine.model.hf_config import HFConfig
from engine.model.quant.stored import Elements, Format, Shape, StoredWeight, count_bits

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)


_SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
    "input_scale", "input_zero_point",
)  # fmt: skip


def _find(stem: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> StoredWeight | None:
    value = _value(stem, shape, tensors)
    if value is None:
        return None
    scale, zero, index = (f"{stem}.weight_{role}" for role in ("scale", "zero_point", "g_idx"))
    found = tensors.get(scale)
    return StoredWeight(
        shape=shape,
        groups=found.shape[1] if found and len(found.shape) == 2 else 1,
        value=value,
        scale=scale,
        zero=_zero(zero, value.bits, tensors),
        group_index=index if index in tensors else None,
    )


def _zero(name: str, bits: int, tensors: Mapping[str, TensorInfo]) -> Elements | None:
    """Words along the outputs, or one value per element as older versions wrote it."""
    if name not in tensors:
        return None
    return Elements(name, "I8" if tensors[name].dtype == "I8" else "I32", bits)


def _value(stem: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> Elements | None:
    packed, plain = f"{stem}.weight_packed", f"{stem}.weight"
    if packed in tensors:
        bits = count_bits(packed, tensors[packed].shape[-1] if tensors[packed].shape else 0, shape[1])
        return Elements(packed, "I32", bits, packed_axis=1)
    match tensors[plain].dtype if plain in tensors else None:
        case "I8":
            return Elements(plain, "I8")
        case "F8_E4M3":
            return Elements(plain, "F8_E4M3")
    return None


def read_compressed_tensors(config: HFConfig) -> Format:
    """Raises ModelError."""
    for group in config.sections("config_groups"):
        _check_format(group)
        _check_weights(group.section("weights"))
    _check_format(config)
    for key in ("sparsity_config", "transform_config"):
        inner = config.section(key)
        if inner.get("format") not in (None, "dense") or inner.get("config_groups"):
            raise config.error(f"{key} is not supported.")
    return Format("compressed-tensors", _SUFFIXES, _find)


def _check_format(config: HFConfig) -> None:
    name = config.get("format") or "dense"
    if name not in _FORMATS:
        raise config.error(f"format {name!r} is not supported; known: {', '.join(_FORMATS)}.")


def _check_weights(weights: HFConfig) -> None:
    """`weights` is null in groups that are about activations alone."""
    kind, bits = weights.get("type"), weights.get("num_bits")
    if (kind, bits) not in ((None, None), ("int", 4), ("int", 8), ("float", 8)):
        raise weights.error(f"{kind} weights of {bits} bits are not supported; int 4, int 8 and float 8 are.")
