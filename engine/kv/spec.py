"""How many bytes a token's keys and values take. It knows sizes, not memory.

    bytes per token = layers x 2 (key, value) x kv_heads x head_dim x dtype_bytes
    bytes per block = bytes per token x block_size

A model with another cache (a latent one, a window) gets another spec; the pool goes on counting blocks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The cache of a model in which every layer keeps full keys and values.

    >>> KVSpec(layers=28, kv_heads=8, head_dim=128, dtype_bytes=2).bytes_per_token
    114688
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int

    @property
    def bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    def bytes_per_block(self, block_size: int) -> int:
        return self.bytes_per_token * block_size

    def blocks_in(self, num_bytes: int, block_size: int) -> int:
        """Blocks that fit into `num_bytes`, the padding block 0 included."""
        return num_bytes // self.bytes_per_block(block_size)
