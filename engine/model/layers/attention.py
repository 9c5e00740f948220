"""Attention over paged KV memory: project, rotate and write this step's keys and values, attend, project.

`T` tokens, `H` query heads, `G` kv heads, `D` head dim, `E` hidden, `M` positions, `R` rotary dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.batch import ForwardBatch
from kernels import api


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention.

    Attributes:
        layer: whose KV memory of the batch it uses.
        qkv: `[(H + 2G)D, E]`: queries, keys, values.
        o: `[E, HD]`.
        norms: of each query and key head, before the rotation; None in most families.
        cos_sin_MR: shared between layers of the same rotary embedding.
        window: positions a token sees, itself included; 0 is all.
        deterministic: what else is in the batch changes no bit.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: api.PackedLinear
    o: api.PackedLinear
    norms: api.HeadNorms | None
    cos_sin_MR: Tensor
    scale: float
    window: int
    softcap: float
    deterministic: bool

    def __call__(self, x_TE: Tensor, batch: ForwardBatch, wanted: api.WantedTokens | None = None) -> Tensor:
        """Writes everybody's keys and values; returns `[T, E]`, or `[W, E]` of the wanted tokens."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv_TXD = api.linear(x_TE, self.qkv).view(x_TE.shape[0], sum(heads), self.head_dim)
        q_THD, k_TGD, v_TGD = torch.split(qkv_TXD, heads, dim=1)
        kv_N2GPD = batch.kv[self.layer]
        q_THD = api.rotate_and_write(
            q_THD, k_TGD, v_TGD, self.cos_sin_MR, batch.position_T, kv_N2GPD, batch.slot_T, self.norms
        )
        attention = batch.attention
        if wanted is not None:
            q_THD, attention = q_THD[wanted.index_W], wanted.attention
            if q_THD.shape[0] == 0:
                return x_TE[:0]
        out_THD = api.paged_attention(
            q_THD,
            kv_N2GPD,
            attention,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            deterministic=self.deterministic,
        )
        return api.linear(out_THD.flatten(1), self.o)
