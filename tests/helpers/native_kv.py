"""Reads KV memory whatever the order of its elements, which the CPU library chooses for its own."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_format import FACTOR_BYTES, head_dim_of
from kernels.paged_attention.cpu import is_native


def gather(kv_N2GPD: Tensor, block_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns copies of K and V of some blocks, `[B, G, P, D]` each, whatever the layout.

    int8 rows come with their factors, as `kv_format.quantize` makes them.
    """
    k_BGPD, v_BGPD = kv_N2GPD[block_B].unbind(1)
    if not is_native(kv_N2GPD):
        return k_BGPD, v_BGPD
    shape = (*k_BGPD.shape[:3], head_dim_of(kv_N2GPD))
    if kv_N2GPD.dtype == torch.int8:
        (k_BGPD, k_factors), (v_BGPD, v_factors) = (_split_slabs(x, shape[3]) for x in (k_BGPD, v_BGPD))
        k_BGPD, v_BGPD = _in_order(k_BGPD, v_BGPD, shape)
        return torch.cat((k_BGPD, k_factors), -1), torch.cat((v_BGPD, v_factors), -1)
    return _in_order(k_BGPD, v_BGPD, shape)


def _split_slabs(x_BGPD: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """int8 slabs -> their elements, and a row of factor bytes per token."""
    b, g, p, _ = x_BGPD.shape
    bytes_BGX = x_BGPD.reshape(b, g, -1)
    return bytes_BGX[..., : p * dim], bytes_BGX[..., p * dim :].reshape(b, g, p, FACTOR_BYTES)


def _in_order(k: Tensor, v: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Undoes the order of the elements, which `kernels/native/write_kv.h` describes."""
    b, g, p, d = shape
    i = 2 if k.dtype in (torch.bfloat16, torch.int8) else 1
    k_BGPD = k.reshape(b, g, d // i, p, i).transpose(2, 3).reshape(b, g, p, d)
    v_BGPD = v.reshape(b, g, p // i, d, i).transpose(3, 4).reshape(b, g, p, d)
    return k_BGPD, v_BGPD
