"""Gemma 2 and Gemma 3 (text).

Norm weights are stored around zero, each block is normed on both sides, embeddings are scaled by
sqrt(hidden_size), and most layers see a window. Gemma 2 caps scores and logits; Gemma 3 norms queries and
keys instead, and rotates local and global layers differently. In multimodal Gemma 3 checkpoints the text
model's config is nested, its weights have their own prefix, and the vision tower is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.model.arch import ArchSpec, RopeSpec
from engine.model.family import Family
from engine.model.hf_config import (
    FULL,
    MAX_HEAD_DIM,
    MAX_LAYERS,
    SLIDING,
    HFConfig,
    Sizes,
    read_activation,
    read_layer_types,
    read_rope,
    read_sizes,
    read_windows,
)
from engine.model.weights import WeightNames

LOCAL_THETA = 10_000.0
GLOBAL_THETA = 1_000_000.0
# Published configs of the multimodal models name only what differs from these.
GEMMA3_SIZES = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


def read_gemma2(config: HFConfig) -> ArchSpec:
    """Gemma2ForCausalLM: every second layer sees everything."""
    sizes = read_sizes(config, head_dim=256)
    rope = read_rope(config, sizes["head_dim"])
    return _read(
        config,
        sizes,
        _layer_types(config, sizes, every=2),
        {SLIDING: rope, FULL: rope},
        attention_softcap=_cap(config, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(config, "final_logit_softcapping", 30.0),
    )


def read_gemma3_text(config: HFConfig) -> ArchSpec:
    """Gemma3ForCausalLM: every sixth layer sees everything, with slower rotation."""
    sizes = read_sizes(config, **GEMMA3_SIZES)
    every = config.integer("sliding_window_pattern", 6, high=MAX_LAYERS)
    return _read(
        config,
        sizes,
        _layer_types(config, sizes, every=every),
        {SLIDING: _local_rope(config, sizes), FULL: _global_rope(config, sizes)},
        logit_softcap=_cap(config, "final_logit_softcapping", 0.0),
        qk_norm=True,
    )


def read_gemma3(config: HFConfig) -> ArchSpec:
    """Gemma3ForConditionalGeneration: its text model."""
    return read_gemma3_text(config.section("text_config"))


def _read(
    config: HFConfig,
    sizes: Sizes,
    types: Sequence[str],
    ropes: Mapping[str, RopeSpec],
    *,
    attention_softcap: float = 0.0,
    logit_softcap: float = 0.0,
    qk_norm: bool = False,
) -> ArchSpec:
    if config.get("use_bidirectional_attention"):
        raise config.error("use_bidirectional_attention makes an encoder; only decoders are served.")
    bias = config.boolean("attention_bias", False)
    return ArchSpec(
        **sizes,
        windows=read_windows(config, types, default=4096),
        ropes=tuple(ropes[kind] for kind in types),
        query_scale=config.integer("query_pre_attn_scalar", 256, high=MAX_HEAD_DIM) ** -0.5,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        sandwich_norms=True,
        qk_norm=qk_norm,
        qkv_bias=bias,
        o_bias=bias,
        activation=read_activation(config, "hidden_activation"),
        embed_scale=sizes["hidden_size"] ** 0.5,
        attention_softcap=attention_softcap,
        logit_softcap=logit_softcap,
        tied_embeddings=config.boolean("tie_word_embeddings", True),
    )


def _layer_types(config: HFConfig, sizes: Sizes, *, every: int) -> tuple[str, ...]:
    layers = range(1, sizes["num_layers"] + 1)
    return read_layer_types(config, [FULL if layer % every == 0 else SLIDING for layer in layers])


def _global_rope(config: HFConfig, sizes: Sizes) -> RopeSpec:
    return read_rope(config, sizes["head_dim"], layer_type=FULL, theta=GLOBAL_THETA)


def _local_rope(config: HFConfig, sizes: Sizes) -> RopeSpec:
    """The old form has one number for it, and its `rope_scaling` is not meant for it."""
    if config.get("rope_parameters"):
        return read_rope(config, sizes["head_dim"], layer_type=SLIDING, theta=LOCAL_THETA)
    return RopeSpec(config.number("rope_local_base_freq", LOCAL_THETA), sizes["head_dim"])


def _cap(config: HFConfig, key: str, default: float) -> float:
    """A softcap: null switches it off, absence means the family's own."""
    if config.has(key) and config.get(key) is None:
        return 0.0
    return config.number(key, default) if default or config.has(key) else 0.0


_NAMES = WeightNames(
    # Multimodal checkpoints: as published, and as later versions of transformers write them.
    prefixes=("model.", "language_model.model.", "model.language_model.", ""),
    lm_heads=("lm_head", "language_model.lm_head"),
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
    ignored=(
        "vision_tower.",
        "model.vision_tower.",
        "multi_modal_projector.",
        "model.multi_modal_projector.",
    ),
)

GEMMA2 = Family(read_gemma2, _NAMES)
GEMMA3_TEXT = Family(read_gemma3_text, _NAMES)
GEMMA3 = Family(read_gemma3, _NAMES)
