"""The most tokens per second that a load can reach on a machine, from bytes and operations.

Prompts are multiplied with the weights of all layers but the last, of which they need keys and values alone,
and each token looks at those before it; a shared prefix is computed once. Decode steps are those of all
clients together. Nothing else costs time, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from benchmarks import limits
from benchmarks.compare.checkpoints import MODELS
from benchmarks.compare.engines import UNQUANTISED, cpu_has_bf16
from benchmarks.compare.loads import Load
from benchmarks.limits import Limits, decode_weights, least_decode_s
from benchmarks.models import read_spec
from engine.model.arch import ArchSpec

# What a weight takes at least; bfloat16 needs no more than 12 of its 16 bits (ADR 8).
WEIGHT_BITS = {UNQUANTISED: 12.0, "8 bits": 8.0, "4 bits": 4.5}


def measure_limits() -> Limits:
    """Of this CPU, in the type that it multiplies fastest in."""
    dtype = torch.bfloat16 if cpu_has_bf16() else torch.float32
    return limits.measure(torch.device("cpu"), dtype)


def all_bounds(
    models: Iterable[str], loads: Mapping[str, Load], limit: Limits
) -> dict[str, dict[str, dict[str, float]]]:
    """By model, by how weights are held, by load."""
    return {
        model: {
            group: {
                name: most_tokens_per_s(load, read_spec(MODELS[model]), bits, limit)
                for name, load in loads.items()
            }
            for group, bits in WEIGHT_BITS.items()
        }
        for model in models
    }


def most_tokens_per_s(load: Load, spec: ArchSpec, weight_bits: float, limits: Limits) -> float:
    """Output tokens per second, over all clients."""
    steps = load.requests / load.clients * load.output_len
    context = load.shared_len + load.input_len + load.output_len / 2
    step_s = least_decode_s(spec, load.clients, context, limits, weight_bits)
    return load.requests * load.output_len / (_prompts_s(load, spec, limits) + steps * step_s)


def _prompts_s(load: Load, spec: ArchSpec, limits: Limits) -> float:
    below = spec.num_layers - 1
    layer = (decode_weights(spec) - spec.vocab_size * spec.hidden_size) / spec.num_layers
    weights = below * layer + 2 * spec.hidden_size * spec.num_kv_heads * spec.head_dim
    own, shared = load.requests * load.input_len, load.shared_len
    looked_at = shared**2 / 2 + own * (shared + load.input_len / 2)
    attention = 4 * below * spec.num_heads * spec.head_dim * looked_at
    return (2 * weights * (own + shared) + attention) / limits.flops_per_s
