"""The blocks of a GGUF file: which bits of one are which.

Shapes: `K` blocks, `n` bytes or values of one.

Source: block_q8_0 and so on in https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.gguf.container import BLOCKS

_CHUNK = 1 << 13  # blocks in floats at a time


def integers(blocks_Kn: Tensor, stored: str) -> Tensor:
    """The values around zero of Q8_0 and Q4_0, int8."""
    if stored == "Q8_0":
        return blocks_Kn[:, 2:].view(torch.int8).contiguous()
    return _nibbles(blocks_Kn[:, 2:]).view(torch.int8).sub_(8)


def scales(blocks_Kn: Tensor, stored: str) -> Tensor:
    """One of each block of Q8_0 and Q4_0, fp16."""
    return _half(blocks_Kn, 0).contiguous()


def floats(blocks_Kn: Tensor, stored: str) -> Tensor:
    """What blocks of any type stand for, fp32."""
    value_Kn = torch.empty(len(blocks_Kn), BLOCKS[stored].values)
    for at in range(0, len(blocks_Kn), _CHUNK):
        part = slice(at, at + _CHUNK)
        value_Kn[part] = _WIDENED[stored](blocks_Kn[part])
    return value_Kn


def _half(blocks_Kn: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, `[K, 1]`."""
    return blocks_Kn[:, at : at + 2].view(torch.float16)


def _nibbles(bytes_Kn: Tensor) -> Tensor:
    """The low halves of all bytes, then the high ones."""
    return torch.cat((bytes_Kn & 15, bytes_Kn >> 4), dim=-1)


def _q8_0(blocks_Kn: Tensor) -> Tensor:
    return integers(blocks_Kn, "Q8_0").float() * _half(blocks_Kn, 0)


def _q4_0(blocks_Kn: Tensor) -> Tensor:
    return integers(blocks_Kn, "Q4_0").float() * _half(blocks_Kn, 0)


def _q4_1(blocks_Kn: Tensor) -> Tensor:
    """A scale and the least value, both fp16."""
    return _nibbles(blocks_Kn[:, 4:]).float() * _half(blocks_Kn, 0) + _half(blocks_Kn, 2)


def _q6_k(blocks_Kn: Tensor) -> Tensor:
    """256 values: 128 bytes of low nibbles, 64 of high pairs of bits, 16 int8 scales, and their fp16 scale.

    Each half of a block has 4 runs of 32: low nibbles of 32 bytes and of the next 32, then the high ones.
    """
    low = _nibbles(blocks_Kn[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    pairs = blocks_Kn[:, 128:192].reshape(-1, 2, 32)
    high = torch.stack([pairs >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2)
    value = (low | high << 4).view(torch.int8).sub_(32).view(-1, 16, 16)
    scale = blocks_Kn[:, 192:208].view(torch.int8).float() * _half(blocks_Kn, 208)
    return (value.float() * scale.unsqueeze(-1)).flatten(1)


_WIDENED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q6_K": _q6_k,
}
