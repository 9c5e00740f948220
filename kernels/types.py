"""The argument bundles of the ops. They know tensors and host integers; not requests.

Shapes are in `kernels/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One flat batch of sequences, those with a single query token first.

    Attributes:
        page_table_SB: int32 block ids; entries past a sequence's last block are never read.
        query_start_S1: int32 [S + 1], exclusive prefix sum of query lengths.
        seq_len_S: int32 context length of each sequence, this step's tokens included.
        num_decodes: how many leading sequences have exactly one query token.
        max_query_len, max_seq_len: host upper bounds, for launch grids and scratch.
        plans: what a backend derives from the lengths once for all layers. Whoever changes lengths in place
            or captures the launches in a graph, clears it first.
    """

    page_table_SB: Tensor
    query_start_S1: Tensor
    seq_len_S: Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class WantedTokens:
    """The W tokens of a step whose hidden states somebody reads. The last layer computes these alone, once it
    has written the keys and values of all.

    Attributes:
        index_W: int64, ascending, at most one of each sequence.
        attention: of a batch of just these tokens.
    """

    index_W: Tensor
    attention: AttentionBatch


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of each query and key head, before the rotation (Qwen 3, Gemma 3).

    Attributes:
        offset: added to the weights.
    """

    q_weight_D: Tensor
    k_weight_D: Tensor
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Where `decode_inputs` writes what a step reads that computes one token of each of S sequences.

    Attributes:
        token_id_S, position_S, slot_S: int64, as in any step.
        next_position_S: int64, of the token to be drawn.
        seq_len_S: int32, the token to compute included; 0 is padding.
        page_table_SB: int32.
    """

    token_id_S: Tensor
    position_S: Tensor
    slot_S: Tensor
    next_position_S: Tensor
    seq_len_S: Tensor
    page_table_SB: Tensor


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How to draw one token per row. Every tensor is [S].

    The draw depends on nothing but the row's logits, `seed_S` and `position_S`: a counter-based generator.

    Attributes:
        temperature_S: fp32; 0 means greedy.
        top_k_S: int32; 0 keeps all.
        top_p_S, min_p_S: fp32; 1.0 and 0.0 keep all.
        seed_S: int64.
        position_S: int64 position of the token being drawn.
        all_greedy: no row samples, so an argmax will do.
        any_filter: some row has top_k, top_p or min_p.
    """

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    seed_S: Tensor
    position_S: Tensor
    all_greedy: bool
    any_filter: bool


@dataclass(frozen=True, slots=True)
class PenaltyParams:
    """What changes the logits before the draw, for rows that ask. `U` rows of persistent state.

    Attributes:
        row_S: int64 row of the state tables, -1 for none.
        output_count_UV: int32, how often each token was generated.
        prompt_seen_UV: bool, whether the token occurs in the prompt.
        presence_S, frequency_S, repetition_S: fp32; 0, 0 and 1 change nothing.
    """

    row_S: Tensor
    output_count_UV: Tensor
    prompt_seen_UV: Tensor
    presence_S: Tensor
    frequency_S: Tensor
    repetition_S: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear's weight in 8 or 4 bits, before a backend packs it.

    `weight[o, order[j]] = (value[o, j] - zero[o, g]) * scale[o, g]`, with `g = j // (I / G)`.

    Attributes:
        bits: 8 or 4: values are -128 to 127, or -8 to 7.
        value_OI: int8, one value per byte whatever the bits; or fp8 (e4m3), 8 bits without zeros.
        scale_OG: fp32; G groups along the inputs, 1 is per channel.
        zero_OG: int8; None where all are zero.
        order_I: int64, the input that column j holds (GPTQ's act-order); None where it is j.

    Raises:
        ValueError: shapes or dtypes that contradict each other.
    """

    bits: int
    value_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None = None
    order_I: Tensor | None = None

    _FORMS: ClassVar = ((4, torch.int8), (8, torch.int8), (8, torch.float8_e4m3fn))

    def __post_init__(self) -> None:
        outputs, inputs = self.value_OI.shape
        groups = self.scale_OG.shape[1]
        if (self.bits, self.value_OI.dtype) not in self._FORMS:
            raise ValueError(f"values must be int8 of 4 or 8 bits, got {self.value_OI.dtype} of {self.bits}")
        if self.scale_OG.shape[0] != outputs or groups == 0 or inputs % groups:
            raise ValueError(f"scales {tuple(self.scale_OG.shape)} do not fit a weight [{outputs}, {inputs}]")
        if self.scale_OG.dtype != torch.float32:
            raise ValueError(f"scales must be fp32, got {self.scale_OG.dtype}")
        zero_OG, order_I = self.zero_OG, self.order_I
        if zero_OG is not None and (zero_OG.shape != self.scale_OG.shape or zero_OG.dtype != torch.int8):
            raise ValueError("zeros must be int8, of the scales' shape")
        if order_I is not None and (order_I.shape != (inputs,) or order_I.dtype != torch.int64):
            raise ValueError("the order must be int64, one entry per input")

    def to(self, device: torch.device) -> QuantizedWeight:
        """The weight there; itself where it is there already."""
        zero_OG, order_I = (x if x is None else x.to(device) for x in (self.zero_OG, self.order_I))
        return QuantizedWeight(
            self.bits, self.value_OI.to(device), self.scale_OG.to(device), zero_OG, order_I
        )


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the order its backend likes, and its bias.

    Attributes:
        kind: what packed it and multiplies with it (`kernels/linear/`).
        weight: the packed elements; only the kind's own module knows their order.
        outputs, inputs: the weight's sizes without padding.
        bits, scale_OG, zero_OG, order_I: of a quantised weight, as in QuantizedWeight; for the native library
            scales and zeros are in panels too, scales in 16 bits where that loses nothing, and bits may be 12
            (a bf16 weight). For Triton they are `[G, O]`, and 16 bits are a weight as it is.
        deterministic: a row's result has the same bits whatever rows are beside it.
    """

    kind: Literal["native", "onednn", "plain", "quantized", "native_quantized", "triton", "fp8"]
    weight: Tensor
    bias_O: Tensor | None
    outputs: int
    inputs: int
    bits: int = 0
    scale_OG: Tensor | None = None
    zero_OG: Tensor | None = None
    order_I: Tensor | None = None
    deterministic: bool = False

    @property
    def num_bytes(self) -> int:
        """Memory it holds, that of a `plain` weight shared with its caller included."""
        tensors = (self.weight, self.bias_O, self.scale_OG, self.zero_OG, self.order_I)
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer's tensors. Norms are None where the model has none.

    Attributes:
        qkv, o, gate_up, down: packed for the device.
        cos_sin_MR: the rotary table.
        window: positions a token sees, itself included; 0 is all.
    """

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    input_norm_E: Tensor
    attention_out_norm_E: Tensor | None
    mlp_norm_E: Tensor
    mlp_out_norm_E: Tensor | None
    head_norms: HeadNorms | None
    cos_sin_MR: Tensor
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParams:
    """What all layers of a decoder share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: Literal["silu", "gelu_tanh"]
    norm_eps: float
    norm_offset: float
    scale: float
    softcap: float
