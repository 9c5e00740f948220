"""Reading the header of a safetensors file without trusting it.

A file is `u64 little-endian n`, `n` bytes of JSON, then the data. The JSON maps each tensor's name to its
dtype, shape and byte range in the data. Ranges must lie in the file, must not overlap, must match dtype and
shape, and must leave nothing uncovered, so that no tensor can show bytes that are not its own.

Source: the format's description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import ModelError

MAX_HEADER_BYTES = 100 << 20
MAX_DIMENSIONS = 8
LENGTH_BYTES = 8

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, end) of a file in the checkpoint's folder."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, by name.

    Raises:
        ModelError: truncated, not safetensors, or inconsistent; names the file and what is wrong.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(file, size, path.name)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}.") from error
    tensors = _parse(text, LENGTH_BYTES + length, path.name)
    _check_cover(tensors, LENGTH_BYTES + length, size, path.name)
    return tensors


def _header_length(file: BinaryIO, size: int, name: str) -> int:
    head = file.read(LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    if len(head) < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise ModelError(f"{name} is cut short or is not a safetensors file ({size} bytes).")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{name}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read.")
    return length


def _parse(text: bytes, data_start: int, file: str) -> dict[str, TensorInfo]:
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: its header is not valid JSON.") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file}: its header is not a JSON object.")
    header.pop("__metadata__", None)
    return {name: _entry(name, entry, data_start, file) for name, entry in header.items()}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _entry(name: str, entry: Any, data_start: int, file: str) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            dtype in ITEM_BYTES and len(shape) <= MAX_DIMENSIONS and all(map(_is_count, [*shape, start, end]))
        ):
            pass
        case _:
            raise ModelError(f"{file}: the entry of tensor {_short(name)} is not one that can be read.")
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ModelError(f"{file}: tensor {_short(name)} does not have the bytes its shape and dtype need.")
    return TensorInfo(file, dtype, tuple(shape), data_start + start, data_start + end)


def _check_cover(tensors: Mapping[str, TensorInfo], data_start: int, size: int, file: str) -> None:
    """The ranges, in order, run from the header's end to the file's end without gap or overlap."""
    at = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != at:
            problem = "overlap" if tensor.start < at else "leave a gap"
            raise ModelError(f"{file}: its tensors {problem} at byte {tensor.start}.")
        at = tensor.end
    if at != size:
        problem = "is cut short" if at > size else "has bytes that belong to no tensor"
        raise ModelError(f"{file} {problem}: its header describes {at} bytes, the file has {size}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
