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
    read_decoder,
    read_layer_types,
    read_sizes,
    read_windows,
)


def read_llama(config: HFConfig) -> ArchSpec:
    """LlamaForCausalLM."""
    bias = config.boolean("attention_bias", False)
    return _read(config, FULL, qkv_bias=bias, o_bias=bias, mlp_bias=config.boolean("mlp_bias", False))


def read_mistral(config: HFConfig) -> ArchSpec:
    """MistralForCausalLM: a missing or null `sliding_window` means full attention."""
    return _read(config, FULL if config.get("sliding_window") is None else SLIDING)


def _read(config: HFConfig, layer_type: str, **switches: bool) -> ArchSpec:
    sizes = read_sizes(config)
    types = read_layer_types(config, (layer_type,) * sizes["num_layers"])
    return read_decoder(config, sizes, read_windows(config, types), **switches)


LLAMA = Family(read_llama)
MISTRAL = Family(read_mistral)
