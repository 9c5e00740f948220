"""Attention over paged KV memory: project, rotate, write this step's keys and values, attend, project.

`T` tokens, `H` query heads, `G` kv heads, `D` head dim, `E` hidden, `M` positions, `R` rotary dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.dist.group import TensorGroup
from engine.model.batch import ForwardBatch
from engine.model.layers.norm import RMSNorm
from kernels import api


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention.

    Attributes:
        layer: whose KV memory of the batch it uses.
        qkv: `[(H + 2G)D, E]`: queries, keys, values.
        o: `[E, HD]`, split by its inputs between the processes of `group`.
        q_norm, k_norm: per head, before the rotation; None in most families.
        cos_sin_MR: shared between layers of the same rotary embedding.
        window: positions a token sees, itself included; 0 is all.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: api.PackedLinear
    o: api.PackedLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    cos_sin_MR: Tensor
    scale: float
    window: int
    softcap: float
    group: TensorGroup

    def __call__(self, x_TE: Tensor, batch: ForwardBatch) -> Tensor:
        q_THD, k_TGD, v_TGD = self._project(x_TE)
        api.rotary(q_THD, k_TGD, self.cos_sin_MR, batch.position_T)
        kv_N2GPD = batch.kv[self.layer]
        api.write_kv(k_TGD, v_TGD, kv_N2GPD, batch.slot_T)
        out_THD = api.paged_attention(
            q_THD, kv_N2GPD, batch.attention, scale=self.scale, window=self.window, softcap=self.softcap
        )
        return self.group.all_reduce(api.linear(out_THD.flatten(1), self.o))

    def _project(self, x_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: views of one tensor, except where a norm made new ones."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv_TXD = api.linear(x_TE, self.qkv).view(x_TE.shape[0], sum(heads), self.head_dim)
        q_THD, k_TGD, v_TGD = torch.split(qkv_TXD, heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        return q_THD, k_TGD, v_TGD
