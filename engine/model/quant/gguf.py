"""GGUF: blocks of 32 inputs with a scale each, in 8 bits (Q8_0) or 4 (Q4_0).

A block's integers and its scale lie together in the file; `engine/model/gguf/` shows them apart, as
`q8_0` or `q4_0` int8 `[O, I]` and `scale` fp16 `[O, G]`. Types that are not integers with a scale are floats
by then.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.gguf.config import INTEGER_BITS
from engine.model.headers import TensorInfo
from engine.model.hf_config import HFConfig
from engine.model.quant.stored import Elements, Format, Shape, StoredWeight

GROUP = 32


def read_gguf_blocks(config: HFConfig) -> Format:
    """What `engine/gguf/config.py` wrote: the types that the file has, as llama.cpp calls them."""
    name = f"GGUF {' and '.join(config.get('types'))}"
    return Format(name, (*(kind.lower() for kind in INTEGER_BITS), "scale"), _find)


def _find(stem: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> StoredWeight | None:
    for kind, bits in INTEGER_BITS.items():
        value = f"{stem}.{kind.lower()}"
        if value in tensors:
            elements = Elements(value, "I8", bits)
            return StoredWeight(shape=shape, groups=shape[1] // GROUP, value=elements, scale=f"{stem}.scale")
    return None
