"""Reading the tensors of a GGUF file, as `shown.py` shows them.

Shapes: `K` blocks, `n` the bytes of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.gguf.container import BLOCKS, is_blocks
from engine.model.gguf import blocks
from engine.model.gguf.shown import Shown
from engine.model.headers import TensorInfo

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFTensors:
    """Reads what `show_tensors` showed, from the mapped file, as safetensors' own reader would."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        size = path.stat().st_size
        # Not shared: a private mapping may be written to without reaching the file, as torch wants it.
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        self._tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        info = self._tensors[name]
        assert isinstance(info, Shown)
        raw = self._bytes[info.start : info.end]
        tensor = _read(raw, info)
        return tensor if info.heads == 0 else _halves_apart(tensor, info.heads)


def _read(raw: Tensor, info: Shown) -> Tensor:
    if not is_blocks(info.stored):
        return raw.view(_DTYPES[info.stored]).view(info.shape)
    blocks_Kn = raw.view(-1, BLOCKS[info.stored].num_bytes)
    reads = {"I8": blocks.integers, "F16": blocks.scales, "F32": blocks.floats}
    return reads[info.dtype](blocks_Kn, info.stored).view(info.shape)


def _halves_apart(x: Tensor, heads: int) -> Tensor:
    """Rows 0, 1, 2, 3 ... of each head, which are pairs, as first all firsts and then all seconds."""
    return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
