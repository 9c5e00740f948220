"""Decoders of well-known shapes with random weights: no files, no download. For timing, not for text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from engine.config import Quantization
from engine.model.arch import ArchSpec
from engine.model.hf_config import HFConfig
from engine.model.quant import holding
from engine.model.registry import find_family
from engine.model.transformer import ModelWeights, Transformer
from engine.model.weights import Slot, model_slots
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
    spec: ArchSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    seed: int = 0,
    deterministic: bool = False,
) -> Transformer:
    """A decoder of this shape whose weights are small random numbers, the same for the same seed."""
    weights = random_weights(spec, dtype=dtype, device=device, seed=seed)
    return assemble(spec, weights, max_model_len, deterministic=deterministic)


def random_weights(
    spec: ArchSpec, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Each slot with its weight; norms are ones."""
    generator = torch.Generator(device=device).manual_seed(seed)
    architecture = "Qwen3ForCausalLM" if spec.qk_norm else "LlamaForCausalLM"
    names = find_family([architecture])[1].names
    for slot in model_slots(spec, names, "", "lm_head"):
        shape = (sum(part.shape[0] for part in slot.parts), *slot.parts[0].shape[1:])
        weight = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        yield slot, weight.fill_(1.0) if weight.dim() == 1 else weight


def assemble(
    spec: ArchSpec,
    weights: Iterable[tuple[Slot, torch.Tensor]],
    max_model_len: int,
    quantization: Quantization | None = None,
    deterministic: bool = False,
) -> Transformer:
    """A decoder of these weights, its linears rounded as the loader would."""

    def pack(name: str, weight_OI: torch.Tensor) -> api.PackedLinear:
        if quantization is None:
            return api.pack_linear(weight_OI, None, deterministic)
        inputs = weight_OI.shape[1]
        held = holding.rounding(name, inputs, quantization)
        rounded = api.quantize(weight_OI, held.bits, inputs // held.groups)
        return api.pack_quantized(rounded, None, weight_OI.dtype, deterministic)

    dense: dict[str, torch.Tensor] = {}
    linear: dict[str, api.PackedLinear] = {}
    for slot, weight in weights:
        if slot.linear:
            linear[slot.name] = pack(slot.name, weight)
        else:
            dense[slot.name] = weight
    if spec.tied_embeddings:
        linear["lm_head"] = pack("lm_head", dense["embed"])
    return Transformer(spec, ModelWeights(dense, linear), max_model_len, deterministic)
