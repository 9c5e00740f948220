"""Paged attention on NVIDIA GPUs: decode rows and prefill rows take a launch each.

No step waits for the device: grids come from host upper bounds, and programs find their work from the
device's lengths, so a call can be captured in a CUDA graph and replayed with other lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.paged_attention.triton_config import decode_config, prefill_config
from kernels.paged_attention.triton_decode import decode
from kernels.paged_attention.triton_prefill import prefill
from kernels.types import AttentionBatch


def paged_attention(
    q_THD: Tensor,
    kv_N2GPD: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attends each new token to its sequence's cached tokens. Rows of no sequence stay uninitialised."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    head_dim, dtype, device = q_THD.shape[2], kv_N2GPD.dtype, q_THD.device
    if batch.num_decodes:
        shape = decode_config(head_dim, dtype, device, deterministic)
        decode(q_THD, kv_N2GPD, batch, out_THD, scale, window, softcap, shape)
    if batch.num_decodes < batch.seq_len_S.shape[0]:
        # Other rows in a tile change no bit of a row, but a tile of another size may.
        long = deterministic or batch.max_query_len * (q_THD.shape[1] // kv_N2GPD.shape[2]) > 64
        tiling = prefill_config(head_dim, dtype, device, long)
        prefill(q_THD, kv_N2GPD, batch, out_THD, scale, window, softcap, tiling)
    return out_THD
