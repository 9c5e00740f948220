"""The KV memory itself: one tensor per layer, every block of the pool in each.

It knows sizes; which block belongs to whom is `engine.kv`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import CacheConfig
from engine.dist.transfer import to_device
from kernels import api


class KVStore:
    """`kv_N2GPD` of every layer, allocated once and touched once.

    Touching means that memory which is not there is missed at start-up, not under load.
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
        dtype: torch.dtype = getattr(torch, cache.dtype)
        shape = (cache.num_blocks, 2, kv_heads, cache.block_size, api.kv_width(head_dim, dtype))
        self.layers: list[Tensor] = [
            torch.empty(shape, dtype=dtype, device=device).zero_() for _ in range(num_layers)
        ]

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copies whole blocks, in every layer: (source, destination) pairs with distinct destinations."""
        if not pairs:
            return
        device = self.layers[0].device
        source, destination = to_device(list(zip(*pairs, strict=True)), torch.int64, device)
        for kv_N2GPD in self.layers:
            api.copy_blocks(kv_N2GPD, source, destination)
