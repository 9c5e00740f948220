"""GPTQ: 4 or 8 bits, in words along the inputs, with the inputs in rows.

`qweight` int32 `[I / n, O]`, n values a word; `scales` `[G, O]`; `qzeros` int32 `[G, O / n]`; `g_idx` int32
`[I]`, the group of each input. checkpoint_format "gptq" writes every zero less one, subtracted from whole
words (so a borrow reaches the neighbour), "gptq_v2" writes it as it is. Bits and group size are taken from
the shapes, so that modules may differ (`dynamic`).

Source: https://github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from engine.model.headers import TensorInfo
from engine.model.hf_config import HFConfig
from engine.model.quant.stored import Elements, Format, Shape, StoredWeight, count_bits

_FORMATS = ("gptq", "gptq_v2")


def read_gptq(config: HFConfig) -> Format:
    """Raises ModelError."""
    bits = config.integer("bits", high=32)
    if bits not in (4, 8):
        raise config.error(f"GPTQ with {bits} bits is not supported; 4 and 8 are.")
    written = config.get("checkpoint_format") or "gptq"
    if written not in _FORMATS:
        raise config.error(f"checkpoint_format {written!r} is not supported; known: {', '.join(_FORMATS)}.")
    find = partial(
        find_gptq,
        symmetric=config.boolean("sym", False),
        ordered=config.boolean("desc_act", False),
        minus_one=written == "gptq",
    )
    return Format("GPTQ", ("qweight", "qzeros", "scales", "g_idx"), find)


def find_gptq(
    stem: str,
    shape: Shape,
    tensors: Mapping[str, TensorInfo],
    *,
    symmetric: bool,
    ordered: bool,
    minus_one: bool,
) -> StoredWeight | None:
    """See `Format.find`.

    Args:
        symmetric: every zero is half the range, and the stored ones need not be read.
        ordered: inputs were quantised by importance, not in order (`desc_act`).
        minus_one: zeros are written less one.
    """
    found = tensors.get(f"{stem}.qweight")
    if found is None:
        return None
    bits = count_bits(f"{stem}.qweight", found.shape[0] if found.shape else 0, shape[1])
    scales = tensors.get(f"{stem}.scales")
    zero = Elements(f"{stem}.qzeros", "I32", bits, packed_axis=1, minus_one=minus_one)
    return StoredWeight(
        shape=shape,
        groups=scales.shape[0] if scales and scales.shape else 1,
        value=Elements(f"{stem}.qweight", "I32", bits, packed_axis=0),
        scale=f"{stem}.scales",
        zero=None if symmetric else zero,
        group_index=f"{stem}.g_idx" if ordered else None,
        transposed=True,
    )
