"""What a decoder is, in plain data: sizes, biases, norms, windows, rotary embedding.

A model family fills an `ArchSpec`; `transformer.py` runs it. Nothing here knows tensors, files or the
names that weights have on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import ModelError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One kind of rotary embedding. Hashable: layers with equal specs share one table.

    Attributes:
        theta: base wavelength.
        dims: rotated dims per head (R <= head_dim); the rest passes through.
        kind: how frequencies are stretched beyond the training length.
        factor: how far they are stretched (linear, dynamic, llama3, yarn).
        original_max_positions: the training length; 0 where the kind does not use it.
        attention_factor: multiplies cos and sin (yarn, longrope).
        low_freq_factor, high_freq_factor: llama3's band edges, in wavelengths per training length.
        beta_fast, beta_slow, truncate: yarn's ramp, in rotations over the training length.
        short_factors, long_factors: longrope's per-frequency divisors, R/2 each.
    """

    theta: float
    dims: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchSpec:
    """A decoder-only transformer with gated MLPs and RMS norms.

    Attributes:
        windows: per layer, how many latest positions (itself included) a token sees; 0 is all.
        ropes: per layer.
        query_scale: multiplies attention scores.
        norm_offset: added to every norm weight (1.0 where weights are stored around zero).
        sandwich_norms: each block's output is normed too, before it joins the residual.
        qk_norm: queries and keys are normed per head, before the rotary embedding.
        embed_scale: multiplies embeddings as they enter the first layer.
        attention_softcap, logit_softcap: c * tanh(x / c) on scores and final logits; 0 is off.
        lm_head: there is an output layer; without one hidden states are all that comes out.
        max_positions: the longest context the checkpoint claims, in tokens.

    Raises:
        ModelError: sizes that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    windows: tuple[int, ...]
    ropes: tuple[RopeSpec, ...]
    query_scale: float
    norm_eps: float
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    embed_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tied_embeddings: bool = False
    lm_head: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config.json: {self.num_heads} attention heads cannot share {self.num_kv_heads} kv heads."
            )
        for name, per_layer in (("window", self.windows), ("rotary embedding", self.ropes)):
            if len(per_layer) != self.num_layers:
                raise ModelError(
                    f"config.json: {len(per_layer)} layers have a {name}, but there are {self.num_layers}."
                )

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim
