"""How each slot's weight will be held in memory: in few bits or in the compute dtype, and in how many bytes.

The loader and the memory plan both ask here. Knows names, shapes and what was asked for; not tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.config import Quantization
from engine.errors import ConfigError
from engine.model.quant.stored import StoredWeight
from engine.model.weights import Slot

_SCALE_BYTES, _SHORT_SCALE_BYTES, _ORDER_BYTES = 4, 2, 8
# The output layer decides between tokens: even among 4 bit weights it gets 8, as one scale for each token.
_HEAD = Quantization(8, 0)


@dataclass(frozen=True, slots=True)
class Holding:
    """A weight `[O, I]` in 8 or 4 bits.

    Attributes:
        rounded: by Quire, as it is loaded; otherwise it comes in integers.
    """

    bits: int
    groups: int
    zero: bool = False
    order: bool = False
    rounded: bool = False

    def num_bytes(self, outputs: int, inputs: int) -> int:
        short = self.rounded and self.bits == 4  # `quantize` chooses such scales
        per_group = (_SHORT_SCALE_BYTES if short else _SCALE_BYTES) + self.zero
        order = inputs * _ORDER_BYTES if self.order else 0
        return outputs * (-(-inputs * self.bits // 8) + self.groups * per_group) + order


def holding(slot: Slot, stored: Mapping[str, StoredWeight], asked: Quantization | None) -> Holding | None:
    """How a slot is held; None is in the compute dtype.

    Raises:
        ConfigError: it cannot be rounded as asked.
    """
    parts = [stored.get(part.name) for part in slot.parts]
    found = [part for part in parts if part is not None and not part.is_widened]
    alike = {(part.value.bits, part.is_float, part.groups, part.group_index is not None) for part in found}
    if len(found) == len(parts) and len(alike) == 1:
        bits, _, groups, order = alike.pop()
        return Holding(bits, groups, any(part.zero is not None for part in found), order)
    if asked is None or not slot.linear:
        return None
    return rounding(slot.name, slot.parts[0].shape[1], asked)


def rounding(name: str, inputs: int, asked: Quantization) -> Holding:
    """How a linear is held that Quire rounds itself.

    Raises:
        ConfigError: no size of group, up to the one asked for, divides the inputs.
    """
    chosen = _HEAD if name == "lm_head" else asked
    if chosen.group_size == 0:
        return Holding(chosen.bits, 1, rounded=True)
    sizes = [n for n in Quantization.GROUP_SIZES if n <= chosen.group_size and inputs % n == 0]
    if not sizes:
        raise ConfigError(
            f"--quantization {asked}: {name} has {inputs} inputs, which groups of "
            f"{Quantization.GROUP_SIZES[0]} do not divide. Choose int8."
        )
    return Holding(chosen.bits, inputs // max(sizes), rounded=True)


def rows(slot: Slot) -> int:
    return sum(part.shape[0] for part in slot.parts)


def memory(
    slots: tuple[Slot, ...], stored: Mapping[str, StoredWeight], asked: Quantization | None
) -> tuple[int, int]:
    """(elements held in the compute dtype, bytes held in integers) of all slots, biases included."""
    elements = integer_bytes = 0
    for slot in slots:
        held = holding(slot, stored, asked)
        in_floats = slot.all_parts if held is None else slot.bias_parts
        elements += sum(math.prod(part.shape) for part in in_floats)
        if held is not None:
            integer_bytes += held.num_bytes(rows(slot), slot.parts[0].shape[1])
    return elements, integer_bytes
