"""Llama 2 and 3, Mistral, and what copies them.

Llama: grouped queries, optional biases everywhere. Mistral: the same with one window for all layers, or none.
"""

from __future__ import annotations

from engine.model.arch import ArchSpec
from engine.model.family import Family
from engine.model.hf_config import (
    FULL,
    SLIDING,
    HFConfig,
    read_activation,
    read_layer_types,
    read_rope,
    read_sizes,
    read_windows,
    rope_positions,
)


def read_llama(config: HFConfig) -> ArchSpec:
    """LlamaForCausalLM."""
    bias = config.boolean("attention_bias", False)
    return _read(config, FULL, attention_bias=bias, mlp_bias=config.boolean("mlp_bias", False))


def read_mistral(config: HFConfig) -> ArchSpec:
    """MistralForCausalLM: a missing or null `sliding_window` means full attention."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return _read(config, kind)


def _read(
    config: HFConfig, layer_type: str, *, attention_bias: bool = False, mlp_bias: bool = False
) -> ArchSpec:
    sizes = read_sizes(config)
    rope = read_rope(config, sizes["head_dim"])
    sizes["max_positions"] = rope_positions(rope, sizes["max_positions"])
    layers = sizes["num_layers"]
    return ArchSpec(
        **sizes,
        windows=read_windows(config, read_layer_types(config, (layer_type,) * layers)),
        ropes=(rope,) * layers,
        query_scale=sizes["head_dim"] ** -0.5,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        activation=read_activation(config, "hidden_act"),
        tied_embeddings=config.boolean("tie_word_embeddings", False),
    )


LLAMA = Family(read_llama)
MISTRAL = Family(read_mistral)
