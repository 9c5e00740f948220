"""Phi-3, 3.5 and 4 (dense): qkv and gate-up fused on disk, longrope for long contexts, partial rotation."""

from __future__ import annotations

from engine.model.arch import ArchSpec
from engine.model.family import Family
from engine.model.hf_config import (
    FULL,
    SLIDING,
    HFConfig,
    read_activation,
    read_rope,
    read_sizes,
    read_windows,
)
from engine.model.weights import WeightNames


def read_phi3(config: HFConfig) -> ArchSpec:
    """Phi3ForCausalLM."""
    sizes = read_sizes(config)
    layers = sizes["num_layers"]
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return ArchSpec(
        **sizes,
        windows=read_windows(config, (kind,) * layers),
        ropes=(read_rope(config, sizes["head_dim"]),) * layers,
        query_scale=sizes["head_dim"] ** -0.5,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        activation=read_activation(config, "hidden_act"),
        tied_embeddings=config.boolean("tie_word_embeddings", False),
    )


PHI3 = Family(read_phi3, WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)))
