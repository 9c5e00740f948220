"""Qwen 2, 2.5 and 3 (dense).

Qwen 2 puts a bias on queries, keys and values; Qwen 3 drops it and norms queries and keys per head.
"""

from __future__ import annotations

from engine.model.arch import ArchSpec
from engine.model.family import Family
from engine.model.hf_config import (
    FULL,
    MAX_LAYERS,
    SLIDING,
    HFConfig,
    Sizes,
    read_activation,
    read_layer_types,
    read_rope,
    read_sizes,
    read_windows,
    rope_positions,
)


def read_qwen2(config: HFConfig) -> ArchSpec:
    """Qwen2ForCausalLM."""
    return _read(config, read_sizes(config), qkv_bias=True, o_bias=False, qk_norm=False)


def read_qwen3(config: HFConfig) -> ArchSpec:
    """Qwen3ForCausalLM."""
    bias = config.boolean("attention_bias", False)
    return _read(config, read_sizes(config, head_dim=128), qkv_bias=bias, o_bias=bias, qk_norm=True)


def _read(config: HFConfig, sizes: Sizes, *, qkv_bias: bool, o_bias: bool, qk_norm: bool) -> ArchSpec:
    rope = read_rope(config, sizes["head_dim"])
    sizes["max_positions"] = rope_positions(rope, sizes["max_positions"])
    return ArchSpec(
        **sizes,
        windows=_windows(config, sizes["num_layers"]),
        ropes=(rope,) * sizes["num_layers"],
        query_scale=sizes["head_dim"] ** -0.5,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        activation=read_activation(config, "hidden_act"),
        tied_embeddings=config.boolean("tie_word_embeddings", False),
    )


def _windows(config: HFConfig, layers: int) -> tuple[int, ...]:
    """`sliding_window` is often set and switched off; where on, the first layers still see everything."""
    if not config.boolean("use_sliding_window", False) or config.get("sliding_window") is None:
        return (0,) * layers
    full = min(config.integer("max_window_layers", 28, low=0, high=MAX_LAYERS), layers)
    types = read_layer_types(config, (FULL,) * full + (SLIDING,) * (layers - full))
    return read_windows(config, types)


QWEN2 = Family(read_qwen2)
QWEN3 = Family(read_qwen3)
