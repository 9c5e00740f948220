"""Phi-3, 3.5 and 4 (dense): qkv and gate-up fused on disk, longrope for long contexts, partial rotation."""

from __future__ import annotations

from engine.model.arch import ArchSpec
from engine.model.family import Family
from engine.model.hf_config import FULL, SLIDING, HFConfig, read_decoder, read_sizes, read_windows
from engine.model.weights import WeightNames


def read_phi3(config: HFConfig) -> ArchSpec:
    """Phi3ForCausalLM."""
    sizes = read_sizes(config)
    kind = FULL if config.get("sliding_window") is None else SLIDING
    windows = read_windows(config, (kind,) * sizes["num_layers"])
    return read_decoder(config, sizes, windows, norm_eps=1e-5)


PHI3 = Family(read_phi3, WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)))
