"""How a weight in small integers lies in a checkpoint: plain data, the same for every format.

The formats differ in what their tensors are called, in which way round these lie, and in which bits of a word
hold which value. Each format's file says that of one weight; the checks here and `unpack.py` do the rest.
Knows headers, not tensors.

`weight[o, i] = (value[o, i] - zero[o, g]) * scale[o, g]`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from engine.errors import ModelError
from engine.model.headers import TensorInfo

Shape = tuple[int, ...]
WORD_BITS = 32
SCALE_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Elements:
    """One tensor of small numbers.

    Attributes:
        dtype: "I32" words of several values, the first in the lowest bits, each raised by half its range; or
            "I8" or "F8_E4M3" elements.
        packed_axis: of the tensor on disk, the axis that words run along.
        interleaved: a word's values are in the order 0, 2, 4, 6, 1, 3, 5, 7 (AWQ).
        minus_one: words hold one less than each value (GPTQ's zeros).
    """

    name: str
    dtype: Literal["I32", "I8", "F8_E4M3"]
    bits: int = 8
    packed_axis: int = 0
    interleaved: bool = False
    minus_one: bool = False

    def shape_on_disk(self, shape: Shape) -> Shape:
        if self.dtype != "I32":
            return shape
        per_word = WORD_BITS // self.bits
        return tuple(-(-n // per_word) if axis == self.packed_axis else n for axis, n in enumerate(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One weight `[O, I]` of a checkpoint in small numbers.

    Attributes:
        groups: scales per output.
        transposed: all its matrices lie the other way round, `[I, O]` and `[G, O]`.
        stays_fp8: the device multiplies fp8, so that it is held as it comes.
        scale: name; `[O, G]`, `[O]` or a single number for all.
        zero: None where all are zero.
        group_index: name of the group of each input; None where they are in order.
    """

    shape: Shape
    groups: int
    value: Elements
    scale: str
    zero: Elements | None = None
    group_index: str | None = None
    transposed: bool = False
    stays_fp8: bool = False

    @property
    def is_float(self) -> bool:
        return self.value.dtype == "F8_E4M3"

    @property
    def is_widened(self) -> bool:
        """Whether it is held in the compute dtype."""
        return self.is_float and not self.stays_fp8

    def on_disk(self, rows: int, columns: int) -> Shape:
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store quantised weights.

    Attributes:
        name: for people.
        suffixes: what the tensors of one weight are called after the module's name.
        find: (module, shape, all tensors) -> how the module's weight is stored, not checked yet; None where
            it is not quantised. Raises ModelError: it is, but not in a way that can be read.
    """

    name: str
    suffixes: tuple[str, ...]
    find: Callable[[str, Shape, Mapping[str, TensorInfo]], StoredWeight | None]


def count_bits(name: str, words: int, size: int) -> int:
    """How many bits each of `size` values has in so many words.

    Raises:
        ModelError: neither 4 nor 8.
    """
    for bits in (4, 8):
        if words == -(-size * bits // WORD_BITS):
            return bits
    raise ModelError(f"{name} packs {size} inputs into {words} words: neither 4 nor 8 bits each.")


def check(stored: StoredWeight, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises ModelError where a tensor is missing, or has not the dtype and shape it needs."""
    outputs, inputs = stored.shape
    groups = stored.groups
    if groups < 1 or inputs % groups:
        raise ModelError(f"{stored.scale} has {groups} groups, which do not divide the {inputs} inputs.")
    value = stored.value
    on_disk = value.shape_on_disk(stored.on_disk(outputs, inputs))
    _expect(tensors, value.name, (value.dtype,), on_disk)
    scale_shape = stored.on_disk(outputs, groups)
    _expect(tensors, stored.scale, SCALE_DTYPES, scale_shape, loose=True)
    if stored.zero is not None:
        on_disk = stored.zero.shape_on_disk(scale_shape)
        _expect(tensors, stored.zero.name, (stored.zero.dtype,), on_disk, loose=stored.zero.dtype != "I32")
    if stored.group_index is not None:
        _expect(tensors, stored.group_index, ("I32", "I64"), (inputs,))


def _expect(
    tensors: Mapping[str, TensorInfo],
    name: str,
    dtypes: tuple[str, ...],
    shape: Shape,
    *,
    loose: bool = False,
) -> None:
    """`loose`: a single number, or a column written as a row, will do."""
    found = tensors.get(name)
    if found is None:
        raise ModelError(f"{name} is missing from the quantised checkpoint.")
    if found.dtype not in dtypes:
        raise ModelError(f"{name} is stored as {found.dtype}; expected {' or '.join(dtypes)}.")
    count = math.prod(found.shape)
    if found.shape != shape and not (loose and (count == 1 or found.shape == (math.prod(shape),))):
        raise ModelError(
            f"{name} has shape {list(found.shape)}, but config.json asks for {list(shape)} as stored."
        )
