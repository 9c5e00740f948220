"""The KV memory itself: one tensor per layer, every block of the pool in each.

It knows sizes; which block belongs to whom is `engine.kv`'s.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from engine.config import CacheConfig
from engine.transfer import to_device
from kernels import api


class KVStore:
    """`kv_N2GPD` of every layer, allocated once, zeros at first.

    On a CPU the system hands the pages out when they are first written. To touch gigabytes at start-up would
    take longer than everything else there, and take memory that a small model may never need.
    """

    def __init__(
        self,
        cache: CacheConfig,
        *,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
    ) -> None:
        dtype: torch.dtype = torch.float8_e4m3fn if cache.dtype == "fp8" else getattr(torch, cache.dtype)
        shape = (cache.num_blocks, 2, kv_heads, cache.block_size, api.kv_width(head_dim, dtype))
        self.layers: list[Tensor] = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copies whole blocks, in every layer: (source, destination) pairs with distinct destinations."""
        if not pairs:
            return
        device = self.layers[0].device
        source, destination = to_device(list(zip(*pairs, strict=True)), torch.int64, device)
        for kv_N2GPD in self.layers:
            api.copy_blocks(kv_N2GPD, source, destination)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU they take no memory before they are written, then huge pages where the system has them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
