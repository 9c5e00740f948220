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
    read_decoder,
    read_layer_types,
    read_sizes,
    read_windows,
)


def read_qwen2(config: HFConfig) -> ArchSpec:
    """Qwen2ForCausalLM."""
    sizes = read_sizes(config)
    return read_decoder(config, sizes, _windows(config, sizes["num_layers"]), qkv_bias=True)


def read_qwen3(config: HFConfig) -> ArchSpec:
    """Qwen3ForCausalLM."""
    sizes = read_sizes(config, head_dim=128)
    bias = config.boolean("attention_bias", False)
    windows = _windows(config, sizes["num_layers"])
    return read_decoder(config, sizes, windows, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _windows(config: HFConfig, layers: int) -> tuple[int, ...]:
    """`sliding_window` is often set and switched off; where on, the first layers still see everything."""
    if not config.boolean("use_sliding_window", False) or config.get("sliding_window") is None:
        return (0,) * layers
    full = min(config.integer("max_window_layers", 28, low=0, high=MAX_LAYERS), layers)
    types = read_layer_types(config, (FULL,) * full + (SLIDING,) * (layers - full))
    return read_windows(config, types)


QWEN2 = Family(read_qwen2)
QWEN3 = Family(read_qwen3)
