"""Decoders of well-known shapes with random weights: no files, no download. For timing, not for text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engine.dist.group import TensorGroup
from engine.model.arch import ArchSpec
from engine.model.hf_config import HFConfig
from engine.model.registry import find_family
from engine.model.transformer import ModelWeights, Transformer
from engine.model.weights import model_slots
from kernels import api


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp,
        "vocab_size": vocab, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip


# The published configurations, as far as they decide the shape.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "tiny": _llama(256, 4, 4, 2, 704, 2048),
    "110m": _llama(768, 12, 12, 4, 2048, 32_000),
    "qwen3-0.6b": {
        **_llama(1024, 28, 16, 8, 3072, 151_936), "architectures": ["Qwen3ForCausalLM"], "head_dim": 128,
        "tie_word_embeddings": True, "rope_theta": 1_000_000.0,
    },
    "llama-3.1-8b": {**_llama(4096, 32, 32, 8, 14_336, 128_256), "rope_theta": 500_000.0},
}  # fmt: skip


def read_spec(name: str) -> ArchSpec:
    """The ArchSpec of one of CONFIGS."""
    config = CONFIGS[name]
    _, family = find_family(config["architectures"])
    return family.read(HFConfig(config))


def random_transformer(
    spec: ArchSpec, *, dtype: torch.dtype, device: torch.device, max_model_len: int, seed: int = 0
) -> Transformer:
    """A decoder of this shape whose weights are small random numbers, the same for the same seed."""
    generator = torch.Generator(device=device).manual_seed(seed)
    architecture = "Qwen3ForCausalLM" if spec.qk_norm else "LlamaForCausalLM"
    names = find_family([architecture])[1].names
    dense: dict[str, torch.Tensor] = {}
    linear: dict[str, api.PackedLinear] = {}
    for slot in model_slots(spec, names, "", "lm_head"):
        shape = (sum(part.shape[0] for part in slot.parts), *slot.parts[0].shape[1:])
        weight = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        if slot.linear:
            linear[slot.name] = api.pack_linear(weight, None)
        else:
            dense[slot.name] = weight.fill_(1.0) if weight.dim() == 1 else weight
    if spec.tied_embeddings:
        embed_VE = dense["embed"]
        linear["lm_head"] = api.pack_linear(embed_VE, None)
    return Transformer(spec, ModelWeights(dense, linear), max_model_len, TensorGroup())
