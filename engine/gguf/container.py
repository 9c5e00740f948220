"""Reading the header of a GGUF file without trusting it: metadata, and where each tensor lies.

Little-endian. `GGUF`, u32 version, u64 tensors, u64 pairs; then the pairs (key, u32 type, value), then the
tensors (name, u32 dimensions, u64 each, innermost first, u32 type, u64 offset), then, aligned, the data. A
string is a u64 length and UTF-8; an array a u32 type, a u64 length and the elements.

The `gguf` package reads the same, but makes a mapped array of every string: 8 s for a vocabulary of 150,000
where this takes a tenth of one. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.errors import ModelError

T = TypeVar("T")

SUFFIX = ".gguf"
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class BlockType(NamedTuple):
    """So many values in so many bytes."""

    values: int
    num_bytes: int


# What can be read. Files of Q4_0 have some tensors in Q6_K (outputs) and Q4_1 (with an importance matrix).
BLOCKS: Mapping[str, BlockType] = {
    "F32": BlockType(1, 4),
    "F16": BlockType(1, 2),
    "BF16": BlockType(1, 2),
    "Q8_0": BlockType(32, 34),
    "Q4_0": BlockType(32, 18),
    "Q4_1": BlockType(32, 20),
    "Q6_K": BlockType(256, 210),
}
# llama.cpp's types by number, for reading and for refusing by name.
_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


class TensorEntry(NamedTuple):
    """One tensor: bytes [start, end) of the file, rows first."""

    type: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GGUF:
    """A file's header."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    def get(self, key: str, of: type[T], default: T | None = None) -> T | None:
        """Raises ModelError where a value is there and is of another type."""
        value = self.metadata.get(key, default)
        if value is not None and not isinstance(value, of):
            raise self.error(f"{key} is not of type {of.__name__}.")
        return value

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.path.name}: {message}")


def is_blocks(kind: str) -> bool:
    """Whether values of this type share a scale, and are no numbers by themselves."""
    return BLOCKS[kind].values > 1


def is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX and path.is_file()


def read_gguf(path: Path) -> GGUF:
    """
    Raises:
        ModelError: not such a file, cut short, one of several parts, or with tensors that cannot be read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path.name} is cut short or is not a GGUF file.") from error


def _read(path: Path, data: mmap.mmap) -> GGUF:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("no magic")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ModelError(f"{path.name} is GGUF version {version}; versions 2 and 3 are read.")
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    metadata = dict(cursor.pair() for _ in range(num_pairs))
    num_parts = _count(metadata, "split.count", 1)
    if num_parts > 1:
        raise ModelError(
            f"{path.name} is one of {num_parts} parts. "
            "Join them first: llama-gguf-split --merge FIRST_PART WHOLE."
        )
    entries = [cursor.tensor() for _ in range(num_tensors)]
    alignment = _count(metadata, "general.alignment", DEFAULT_ALIGNMENT)
    if alignment == 0 or alignment % 8:
        raise ValueError("alignment")
    start = -(-cursor.at // alignment) * alignment
    tensors = {entry[0]: _placed(path, start, *entry) for entry in entries}
    if any(tensor.end > len(data) for tensor in tensors.values()) or len(tensors) < num_tensors:
        raise ValueError("tensors outside of the file, or one name twice")
    return GGUF(path, metadata, tensors)


def _placed(
    path: Path, data_start: int, name: str, shape: tuple[int, ...], number: int, offset: int
) -> TensorEntry:
    kind = _TYPES.get(number, f"type {number}")
    if kind not in BLOCKS:
        raise ModelError(
            f"{path.name}: tensor {name[:80]} is {kind}, which cannot be read; {', '.join(BLOCKS)} can. "
            "Take the model's Q8_0 or Q4_0 file, or its safetensors checkpoint with --quantization."
        )
    block, count = BLOCKS[kind], math.prod(shape)
    if not shape or shape[-1] % block.values or offset % 8:
        raise ValueError("no whole blocks")
    start = data_start + offset
    return TensorEntry(kind, shape, start, start + count // block.values * block.num_bytes)


class _Cursor:
    """A place in the header; whatever leads out of the file is a ValueError or a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self.at = 0

    def take(self, num_bytes: int) -> bytes:
        end = self.at + num_bytes
        if end > self._size:
            raise ValueError("cut short")
        taken, self.at = self._data[self.at : end], end
        return taken

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def pair(self) -> tuple[str, Any]:
        return self.string(), self._value(self.number("I"))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset."""
        name, dimensions = self.string(), self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError("too many dimensions")
        innermost_first = [self.number("Q") for _ in range(dimensions)]
        return name, tuple(reversed(innermost_first)), self.number("I"), self.number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_code(kind))
        element, count = self.number("I"), self.number("Q")
        if element == _STRING:
            return self._strings(count)
        code = _code(element)
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))

    def _strings(self, count: int) -> list[str]:
        """The long way, in one loop: vocabularies have hundreds of thousands."""
        length: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        data, size, at, found = self._data, self._size, self.at, []
        for _ in range(count):
            start = at + 8
            at = start + length(data, at)[0]
            if at > size:
                raise ValueError("cut short")
            found.append(data[start:at].decode())
        self.at = at
        return found


def _count(metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or value < 0:
        raise ValueError("not a count")
    return value


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError("unknown type of value")
    return _NUMBERS[kind]
