"""The one decoder. It runs any `ArchSpec`, on one device, and keeps no state between calls.

`T` tokens in the step, `S` sequences, `E` hidden, `V` vocabulary, `D` head dim.

The residual stream is one tensor that norms add to in place: each block hands its output on, and the next
norm first adds it to the residual, then norms the sum.

    pre-norm    residual += delta;  x = norm(residual);  delta = block(x)
    sandwich    residual += delta;  x = norm(residual);  delta = norm(block(x))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.arch import ArchSpec, RopeSpec
from engine.model.batch import ForwardBatch
from engine.model.layers.attention import Attention
from engine.model.layers.mlp import GatedMLP
from engine.model.layers.norm import RMSNorm
from engine.model.layers.rotary import build_cos_sin
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


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and MLP, each between its norms."""

    input_norm: RMSNorm
    attention: Attention
    attention_out_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: GatedMLP
    mlp_out_norm: RMSNorm | None

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
        """The first half: adds `delta_TE`, returns the attention's output, of the wanted tokens or of all."""
        if delta_TE is None:
            x_TE = self.input_norm(residual_TE)
        else:
            x_TE = self.input_norm(delta_TE, residual_TE)
        return self.attention(x_TE, batch, wanted)

    def feed_forward(self, delta_TE: Tensor, residual_TE: Tensor) -> Tensor:
        """The second half: adds the attention's output, returns the MLP's."""
        if self.attention_out_norm is not None:
            delta_TE = self.attention_out_norm(delta_TE)
        delta_TE = self.mlp(self.mlp_norm(delta_TE, residual_TE))
        if self.mlp_out_norm is not None:
            delta_TE = self.mlp_out_norm(delta_TE)
        return delta_TE


class Transformer:
    """A loaded decoder.

    Args:
        max_model_len: positions to build rotary tables for.
        deterministic: a sequence's results are the same bits whatever else is in the batch.

    Attributes:
        native: runs all layers in one call on a CPU; None where they run one by one.
    """

    def __init__(
        self,
        spec: ArchSpec,
        weights: ModelWeights,
        max_model_len: int,
        deterministic: bool = False,
    ) -> None:
        self.spec = spec
        self.deterministic = deterministic
        self.max_model_len = max_model_len
        self.embed_VE = weights.dense["embed"]
        # In the compute dtype, as the models were trained: sqrt(hidden_size) is not exact in bf16.
        self._embed_scale = torch.tensor(spec.embed_scale, dtype=self.embed_VE.dtype).item()
        self._lm_head = weights.linear["lm_head"] if spec.lm_head else None
        builder = _Builder(spec, weights, max_model_len, deterministic)
        self.layers = [builder.layer(index) for index in range(spec.num_layers)]
        self._final_norm = builder.norm("final_norm")
        self.native = builder.native(self.layers, self._final_norm)

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
        return self._final_norm(last.feed_forward(delta_WE, residual_WE), residual_WE)

    def logits(self, hidden_SE: Tensor) -> Tensor:
        """`logits_SV` fp32 of the rows of `forward`'s result that are wanted."""
        assert self._lm_head is not None, "text was asked of a decoder without an output layer"
        logits_SV = api.linear(hidden_SE, self._lm_head).float()
        cap = self.spec.logit_softcap
        return logits_SV.div_(cap).tanh_().mul_(cap) if cap else logits_SV

    def _embed(self, token_id_T: Tensor) -> Tensor:
        hidden_TE = torch.nn.functional.embedding(token_id_T, self.embed_VE)
        return hidden_TE if self._embed_scale == 1.0 else hidden_TE.mul_(self._embed_scale)


class _Builder:
    """Puts layers together from the spec and the weights; rotary tables are shared between layers."""

    def __init__(
        self,
        spec: ArchSpec,
        weights: ModelWeights,
        max_model_len: int,
        deterministic: bool,
    ) -> None:
        self._spec = spec
        self._deterministic = deterministic
        self._weights = weights
        device = weights.dense["embed"].device
        self._tables: dict[RopeSpec, Tensor] = {
            rope: build_cos_sin(rope, max_model_len, device) for rope in set(spec.ropes)
        }

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._weights.dense[name], self._spec.norm_eps, self._spec.norm_offset)

    def native(self, layers: Sequence[DecoderLayer], final_norm: RMSNorm) -> api.NativeDecoder | None:
        """The same layers for one call of the CPU library, where it can run them."""
        spec = self._spec
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
        return api.native_decoder([_weights(layer) for layer in layers], final_norm.weight_E, params)

    def layer(self, index: int) -> DecoderLayer:
        own, spec = f"layers.{index}.", self._spec
        return DecoderLayer(
            input_norm=self.norm(own + "input_norm"),
            attention=self._attention(index, own),
            attention_out_norm=self.norm(own + "attention_out_norm") if spec.sandwich_norms else None,
            mlp_norm=self.norm(own + "mlp_norm"),
            mlp=self._mlp(own),
            mlp_out_norm=self.norm(own + "mlp_out_norm") if spec.sandwich_norms else None,
        )

    def _attention(self, index: int, own: str) -> Attention:
        spec, linear = self._spec, self._weights.linear
        return Attention(
            layer=index,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            qkv=linear[own + "qkv"],
            o=linear[own + "o"],
            norms=self._head_norms(own) if spec.qk_norm else None,
            cos_sin_MR=self._tables[spec.ropes[index]],
            scale=spec.query_scale,
            window=spec.windows[index],
            softcap=spec.attention_softcap,
            deterministic=self._deterministic,
        )

    def _head_norms(self, own: str) -> api.HeadNorms:
        dense, spec = self._weights.dense, self._spec
        return api.HeadNorms(dense[own + "q_norm"], dense[own + "k_norm"], spec.norm_eps, spec.norm_offset)

    def _mlp(self, own: str) -> GatedMLP:
        linear = self._weights.linear
        return GatedMLP(linear[own + "gate_up"], linear[own + "down"], self._spec.activation)


def _weights(layer: DecoderLayer) -> api.LayerWeights:
    attention, mlp, norms = layer.attention, layer.mlp, layer.attention.norms
    return api.LayerWeights(
        qkv=attention.qkv,
        o=attention.o,
        gate_up=mlp.gate_up,
        down=mlp.down,
        input_norm_E=layer.input_norm.weight_E,
        attention_out_norm_E=_norm_weight(layer.attention_out_norm),
        mlp_norm_E=layer.mlp_norm.weight_E,
        mlp_out_norm_E=_norm_weight(layer.mlp_out_norm),
        q_norm_D=norms.q_weight_D if norms else None,
        k_norm_D=norms.k_weight_D if norms else None,
        cos_sin_MR=attention.cos_sin_MR,
        window=attention.window,
    )


def _norm_weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight_E
