"""Llama-shaped decoders with random weights, for measuring: the arithmetic is the real one, the text is not.

`T` tokens, `E` hidden, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.arch import ArchSpec, RopeSpec
from engine.model.transformer import ModelWeights, Transformer
from engine.model.weights import Slot, WeightNames, model_slots
from kernels import api


def llama_spec(
    *, layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocab: int, max_positions: int = 8192
) -> ArchSpec:
    head_dim = hidden // heads
    return ArchSpec(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=mlp,
        max_positions=max_positions,
        windows=(0,) * layers,
        ropes=(RopeSpec(theta=10_000.0, dims=head_dim),) * layers,
        query_scale=head_dim**-0.5,
        norm_eps=1e-5,
    )


# The 110m has the sizes of Quire's comparisons with other servers; the others bracket it.
SIZES: dict[str, ArchSpec] = {
    "8m": llama_spec(layers=6, hidden=256, heads=8, kv_heads=4, mlp=768, vocab=8000),
    "110m": llama_spec(layers=12, hidden=768, heads=12, kv_heads=4, mlp=2048, vocab=32_000),
    "600m": llama_spec(layers=28, hidden=1024, heads=16, kv_heads=8, mlp=3072, vocab=64_000),
    "8b": llama_spec(layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14_336, vocab=128_256),
}


def build(
    spec: ArchSpec, dtype: torch.dtype, device: torch.device, max_model_len: int, seed: int = 0
) -> Transformer:
    """A decoder whose weights are small normal numbers, the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight_of(slot: Slot) -> Tensor:
        rows = sum(part.shape[0] for part in slot.parts)
        shape = (rows, *slot.parts[0].shape[1:])
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(0.02)

    dense: dict[str, Tensor] = {}
    linear: dict[str, api.PackedLinear] = {}
    for slot in model_slots(spec, WeightNames(), "model.", "lm_head"):
        if slot.linear:
            linear[slot.name] = api.pack_linear(weight_of(slot), None)
        else:
            dense[slot.name] = weight_of(slot)
    return Transformer(spec, ModelWeights(dense, linear), max_model_len)
