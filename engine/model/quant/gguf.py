"""GGUF: blocks of 32 inputs with a scale each, in 8 bits (Q8_0) or 4 (Q4_0).

A block's integers and its scale lie together in the file; `engine/model/gguf/` shows them apart, as
`q8_0` or `q4_0` int8 `[O, I]` and `scale` fp16 `[O, G]`. Types that are not integers with a scale are floats
by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.gguf.config import INTEGER_BITS
from engine.model.headers import TensorInfo
from engine.model.hf_config import HFConfig
from engine.model.quant.stored import Elements, Shape, StoredWeight, check

GROUP = 32


@dataclass(frozen=True, slots=True)
class GGUFBlocks:
    """
    Attributes:
        name: with the types that the file has, as llama.cpp calls them.
    """

    name: str
    suffixes: tuple[str, ...] = (*(kind.lower() for kind in INTEGER_BITS), "scale")

    def find(self, stem: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> StoredWeight | None:
        for kind, bits in INTEGER_BITS.items():
            value = f"{stem}.{kind.lower()}"
            if value in tensors:
                return check(
                    StoredWeight(
                        shape=shape,
                        groups=shape[1] // GROUP,
                        value=Elements(value, "I8", bits),
                        scale=f"{stem}.scale",
                    ),
                    tensors,
                )
        return None


def read_gguf_blocks(config: HFConfig) -> GGUFBlocks:
    """What `engine/gguf/config.py` wrote."""
    return GGUFBlocks(f"GGUF {' and '.join(config.get('types'))}")
