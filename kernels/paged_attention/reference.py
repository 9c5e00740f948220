"""Attention over paged KV memory in plain torch: what is right, and the fall-back without native code.

It gathers each sequence's keys and values and never touches a slot outside them, so whatever lies in free
blocks, in the tail of a last block or below a sliding window (NaN included) cannot reach the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_format import dequantize, is_eight_bit
from kernels.types import AttentionBatch


def gather(kv_N2GPD: Tensor, page_table_B: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Returns K and V of the positions [begin, end) of one sequence as two `[G, end - begin, D]` copies.

    Memory in 8 bits comes back as fp32.
    """
    block_size = kv_N2GPD.shape[3]
    first, last = begin // block_size, -(-end // block_size)
    eight = is_eight_bit(kv_N2GPD.dtype)
    stored = kv_N2GPD.view(torch.int8) if eight else kv_N2GPD  # torch does not gather fp8
    blocks_B2GPD = stored[page_table_B[first:last].long()]
    k_v_2GLD = blocks_B2GPD.permute(1, 2, 0, 3, 4).flatten(2, 3)
    k_v_2GLD = k_v_2GLD[:, :, begin - first * block_size : end - first * block_size]
    if eight:
        k_v_2GLD = dequantize(k_v_2GLD.contiguous().view(kv_N2GPD.dtype))
    return k_v_2GLD[0], k_v_2GLD[1]


def paged_attention(
    q_THD: Tensor,
    kv_N2GPD: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Computes causal attention of each sequence's new tokens over its cached ones; fp32 inside.

    See `kernels/paged_attention/README.md` for the maths. Returns `[T, H, D]` in q's dtype; rows that belong
    to no sequence, or to one of length 0, are zero.
    """
    out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
    starts = batch.query_start_S1.tolist()
    for s, length in enumerate(batch.seq_len_S.tolist()):
        start, end = starts[s], starts[s + 1]
        if start == end or length == 0:
            continue
        first_position = length - (end - start)
        begin = max(0, first_position - window + 1) if window else 0
        k_GLD, v_GLD = gather(kv_N2GPD, batch.page_table_SB[s], begin, length)
        mask_QL = _mask(first_position, begin, length, window, q_THD.device)
        out_THD[start:end] = _attend(q_THD[start:end], k_GLD, v_GLD, mask_QL, scale, softcap)
    return out_THD


def _mask(first_position: int, begin: int, length: int, window: int, device: torch.device) -> Tensor:
    """True where query position i may see key position j: j <= i, and j > i - window if there is one."""
    query_Q1 = torch.arange(first_position, length, device=device)[:, None]
    key_L = torch.arange(begin, length, device=device)
    mask_QL = key_L <= query_Q1
    return mask_QL & (key_L > query_Q1 - window) if window else mask_QL


def _attend(
    q_QHD: Tensor, k_GLD: Tensor, v_GLD: Tensor, mask_QL: Tensor, scale: float, softcap: float
) -> Tensor:
    groups, head_dim = k_GLD.shape[0], q_QHD.shape[2]
    # Query head h reads kv head h // (H / G), so [Q, H] splits into [Q, G, H / G].
    q_GCQD = q_QHD.float().reshape(q_QHD.shape[0], groups, -1, head_dim).permute(1, 2, 0, 3)
    k_GLD, v_GLD = k_GLD.float(), v_GLD.float()
    score_GCQL = torch.einsum("gcqd,gld->gcql", q_GCQD, k_GLD) * scale
    if softcap:
        score_GCQL = softcap * torch.tanh(score_GCQL / softcap)
    weight_GCQL = score_GCQL.masked_fill(~mask_QL, float("-inf")).softmax(-1)
    out_GCQD = torch.einsum("gcql,gld->gcqd", weight_GCQL, v_GLD)
    return out_GCQD.permute(2, 0, 1, 3).reshape(-1, q_QHD.shape[1], head_dim).to(q_QHD.dtype)
