"""The one decoder. It runs any `ArchSpec`, on one device, and keeps no state between calls.

`T` tokens in the step, `S` sequences, `E` hidden, `V` vocabulary, `M` positions, `R` rotary dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.arch import ArchSpec
from engine.model.batch import ForwardBatch
from engine.model.layer import DecoderLayer
from engine.model.rotary import build_cos_sin
from kernels import api


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Everything loaded, by slot name (`weights.py`), on the device and in the compute dtype.

    Attributes:
        dense: the embedding and the norms' weights.
        linear: packed matrices, `lm_head` among them where the spec has one.
    """

    dense: Mapping[str, Tensor]
    linear: Mapping[str, api.PackedLinear]

    def layer(self, index: int, spec: ArchSpec, cos_sin_MR: Tensor) -> api.LayerWeights:
        """Those of one layer, with its rotary table."""
        own, dense, linear = f"layers.{index}.", self.dense, self.linear
        norms = None
        if spec.qk_norm:
            q_weight_D, k_weight_D = dense[own + "q_norm"], dense[own + "k_norm"]
            norms = api.HeadNorms(q_weight_D, k_weight_D, spec.norm_eps, spec.norm_offset)
        return api.LayerWeights(
            qkv=linear[own + "qkv"],
            o=linear[own + "o"],
            gate_up=linear[own + "gate_up"],
            down=linear[own + "down"],
            input_norm_E=dense[own + "input_norm"],
            attention_out_norm_E=dense.get(own + "attention_out_norm"),
            mlp_norm_E=dense[own + "mlp_norm"],
            mlp_out_norm_E=dense.get(own + "mlp_out_norm"),
            head_norms=norms,
            cos_sin_MR=cos_sin_MR,
            window=spec.windows[index],
        )


class Transformer:
    """A loaded decoder.

    Args:
        max_model_len: positions to build rotary tables for.
        deterministic: a sequence's results are the same bits whatever else is in the batch.

    Attributes:
        native: runs all layers in one call on a CPU; None where they run one by one.
    """

    def __init__(
        self, spec: ArchSpec, weights: ModelWeights, max_model_len: int, deterministic: bool = False
    ) -> None:
        self.spec = spec
        self.deterministic = deterministic
        self.max_model_len = max_model_len
        self.embed_VE = weights.dense["embed"]
        # In the compute dtype, as the models were trained: sqrt(hidden_size) is not exact in bf16.
        self._embed_scale = torch.tensor(spec.embed_scale, dtype=self.embed_VE.dtype).item()
        self._lm_head = weights.linear["lm_head"] if spec.lm_head else None
        self._final_norm_E = weights.dense["final_norm"]
        params = api.DecoderParams(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            activation=spec.activation,
            norm_eps=spec.norm_eps,
            norm_offset=spec.norm_offset,
            scale=spec.query_scale,
            softcap=spec.attention_softcap,
        )
        # Layers of the same rotary embedding share one table.
        tables = {rope: build_cos_sin(rope, max_model_len, self.device) for rope in set(spec.ropes)}
        layers = [weights.layer(index, spec, tables[rope]) for index, rope in enumerate(spec.ropes)]
        self.layers = [DecoderLayer(index, w, params, deterministic) for index, w in enumerate(layers)]
        self.native = api.native_decoder(layers, self._final_norm_E, params)

    @property
    def device(self) -> torch.device:
        return self.embed_VE.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_VE.dtype

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Writes this step's keys and values and returns the hidden states, final norm applied: `[T, E]`, or
        `[W, E]` of the wanted tokens."""
        batch.attention.plans.clear()  # lengths may have changed, and a captured forward must plan for itself
        residual_TE, wanted = self._embed(batch.token_id_T), batch.wanted
        if self.native is not None and self.native.takes(batch.kv):
            return self.native(residual_TE, batch.position_T, batch.slot_T, batch.attention, batch.kv, wanted)
        *below, last = self.layers
        delta_TE = None
        for layer in below:
            delta_TE = layer(delta_TE, residual_TE, batch)
        delta_WE = last.attend(delta_TE, residual_TE, batch, wanted)
        if delta_WE.shape[0] == 0:
            return delta_WE
        residual_WE = residual_TE if wanted is None else residual_TE[wanted.index_W]
        return api.rms_norm(
            last.feed_forward(delta_WE, residual_WE),
            self._final_norm_E,
            self.spec.norm_eps,
            offset=self.spec.norm_offset,
            residual_TE=residual_WE,
        )

    def logits(self, hidden_SE: Tensor) -> Tensor:
        """`logits_SV` fp32 of the rows of `forward`'s result that are wanted."""
        assert self._lm_head is not None, "text was asked of a decoder without an output layer"
        logits_SV = api.linear(hidden_SE, self._lm_head).float()
        cap = self.spec.logit_softcap
        return logits_SV.div_(cap).tanh_().mul_(cap) if cap else logits_SV

    def _embed(self, token_id_T: Tensor) -> Tensor:
        hidden_TE = torch.nn.functional.embedding(token_id_T, self.embed_VE)
        return hidden_TE if self._embed_scale == 1.0 else hidden_TE.mul_(self._embed_scale)
