"""One layer of the decoder: attention over paged KV memory, then a gated MLP, each between its norms.

`T` tokens, `H` query heads, `G` kv heads, `D` head dim, `E` hidden, `F` feed-forward.

The residual stream is one tensor that norms add to in place: each block hands its output on, and the next
norm first adds it to the residual, then norms the sum.

    pre-norm    residual += delta;  x = norm(residual);  delta = block(x)
    sandwich    residual += delta;  x = norm(residual);  delta = norm(block(x))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.batch import ForwardBatch
from kernels import api


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Launches op by op what `api.native_decoder` does in one call for all layers.

    Attributes:
        index: whose KV memory of the batch it uses.
        params: what all layers share.
        deterministic: what else is in the batch changes no bit.
    """

    index: int
    weights: api.LayerWeights
    params: api.DecoderParams
    deterministic: bool

    def __call__(self, delta_TE: Tensor | None, residual_TE: Tensor, batch: ForwardBatch) -> Tensor:
        """Adds `delta_TE` and the attention's output to the residual; returns the MLP's, not yet added.

        Args:
            delta_TE: what the layer below returned; None for the first layer.
        """
        return self.feed_forward(self.attend(delta_TE, residual_TE, batch), residual_TE)

    def attend(
        self,
        delta_TE: Tensor | None,
        residual_TE: Tensor,
        batch: ForwardBatch,
        wanted: api.WantedTokens | None = None,
    ) -> Tensor:
        """The first half: adds `delta_TE` and writes everybody's keys and values; returns the attention's
        output, `[T, E]`, or `[W, E]` of the wanted tokens."""
        w, params = self.weights, self.params
        if delta_TE is None:
            x_TE = self._norm(residual_TE, w.input_norm_E)
        else:
            x_TE = self._norm(delta_TE, w.input_norm_E, residual_TE)
        heads = [params.num_heads, params.num_kv_heads, params.num_kv_heads]
        qkv_TXD = api.linear(x_TE, w.qkv).view(x_TE.shape[0], sum(heads), params.head_dim)
        q_THD, k_TGD, v_TGD = torch.split(qkv_TXD, heads, dim=1)
        kv_N2GPD, attention = batch.kv[self.index], batch.attention
        q_THD = api.rotate_and_write(
            q_THD, k_TGD, v_TGD, w.cos_sin_MR, batch.position_T, kv_N2GPD, batch.slot_T, w.head_norms
        )
        if wanted is not None:
            q_THD, attention = q_THD[wanted.index_W], wanted.attention
            if q_THD.shape[0] == 0:
                return x_TE[:0]
        out_THD = api.paged_attention(
            q_THD,
            kv_N2GPD,
            attention,
            scale=params.scale,
            window=w.window,
            softcap=params.softcap,
            deterministic=self.deterministic,
        )
        return api.linear(out_THD.flatten(1), w.o)

    def feed_forward(self, delta_TE: Tensor, residual_TE: Tensor) -> Tensor:
        """The second half: adds the attention's output, returns the MLP's."""
        w = self.weights
        if w.attention_out_norm_E is not None:
            delta_TE = self._norm(delta_TE, w.attention_out_norm_E)
        gate_up_T2F = api.linear(self._norm(delta_TE, w.mlp_norm_E, residual_TE), w.gate_up)
        hidden_TF = api.silu_mul(gate_up_T2F, activation=self.params.activation)
        delta_TE = api.linear(hidden_TF, w.down)
        if w.mlp_out_norm_E is not None:
            delta_TE = self._norm(delta_TE, w.mlp_out_norm_E)
        return delta_TE

    def _norm(self, x_TE: Tensor, weight_E: Tensor, residual_TE: Tensor | None = None) -> Tensor:
        """The norm of x, or, with a residual, of `residual += x` (in place)."""
        params = self.params
        return api.rms_norm(
            x_TE, weight_E, params.norm_eps, offset=params.norm_offset, residual_TE=residual_TE
        )
