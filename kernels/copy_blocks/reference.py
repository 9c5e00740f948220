"""Copies whole KV blocks, in plain torch."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(kv_N2GPD: Tensor, src_: Tensor, dst_: Tensor) -> None:
    """Copies block `src_[i]` to block `dst_[i]`; no block is both a source and a destination."""
    kv_N2GPD[dst_] = kv_N2GPD[src_]
