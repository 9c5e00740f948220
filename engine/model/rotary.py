"""Rotary tables: cos and sin of every position, built once per kind of rotary embedding.

Keys are rotated before they are cached and cached keys are shared, so what a position's rotation is must
never change. Kinds that depend on the length of the sequence (longrope, dynamic) are therefore settled once,
by the longest context that will be served.

    longrope  the long factors if max_model_len exceeds the training length, else the short ones
    dynamic   the base of a sequence of max_model_len tokens; within the training length, the plain one
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model.arch import RopeSpec


def build_cos_sin(rope: RopeSpec, max_model_len: int, device: torch.device | str) -> Tensor:
    """The table of `kernels.api.rotary`, `cos_sin_MR` fp32: row m is cos[R/2], sin[R/2] at position m."""
    frequency_R2 = inverse_frequencies(rope, max_model_len)
    position_M = torch.arange(max_model_len, dtype=torch.float32)
    angle_MR2 = position_M[:, None] * frequency_R2
    table_MR = torch.cat((angle_MR2.cos(), angle_MR2.sin()), dim=-1) * rope.attention_factor
    return table_MR.to(device)


def inverse_frequencies(rope: RopeSpec, max_model_len: int) -> Tensor:
    """Radians per position of each pair of dims, fp32 `[R/2]`."""
    match rope.kind:
        case "default":
            return 1.0 / _wavelengths(rope)
        case "linear":
            return 1.0 / _wavelengths(rope) / rope.factor
        case "dynamic":
            return 1.0 / _wavelengths(rope, _dynamic_theta(rope, max_model_len))
        case "llama3":
            return _llama3(rope)
        case "yarn":
            return _yarn(rope)
        case "longrope":
            return _longrope(rope, max_model_len)


def _wavelengths(rope: RopeSpec, theta: float | None = None) -> Tensor:
    """Positions per radian, `theta^(2i / R)`."""
    exponent_R2 = torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims
    return (rope.theta if theta is None else theta) ** exponent_R2


def _dynamic_theta(rope: RopeSpec, max_model_len: int) -> float:
    """NTK-aware scaling: theta grows so that the slowest pair spans the longer context."""
    length = max(max_model_len, rope.original_max_positions)
    stretch = rope.factor * length / rope.original_max_positions - (rope.factor - 1)
    return rope.theta * math.pow(stretch, rope.dims / (rope.dims - 2))


def _llama3(rope: RopeSpec) -> Tensor:
    """Llama 3.1: slow pairs are stretched, fast ones kept, those between are blended."""
    plain_R2 = 1.0 / _wavelengths(rope)
    # How often a pair turns within the training length decides which of the three it is.
    turns_R2 = rope.original_max_positions * plain_R2 / (2 * math.pi)
    band = rope.high_freq_factor - rope.low_freq_factor
    keep_R2 = ((turns_R2 - rope.low_freq_factor) / band).clamp(0, 1)
    return plain_R2 * keep_R2 + plain_R2 / rope.factor * (1 - keep_R2)


def _yarn(rope: RopeSpec) -> Tensor:
    """YaRN, Peng et al. 2023, section 3.2: a linear ramp over pair indices between two turn counts."""
    plain_R2 = 1.0 / _wavelengths(rope)
    low, high = _yarn_pair(rope, rope.beta_fast), _yarn_pair(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    if low == high:
        high += 0.001
    stretch_R2 = ((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain_R2 * (1 - stretch_R2) + plain_R2 / rope.factor * stretch_R2


def _yarn_pair(rope: RopeSpec, turns: float) -> float:
    """The index of the pair that turns `turns` times within the training length."""
    return (
        rope.dims * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
    )


def _longrope(rope: RopeSpec, max_model_len: int) -> Tensor:
    long = max_model_len > rope.original_max_positions
    factors_R2 = torch.tensor(rope.long_factors if long else rope.short_factors, dtype=torch.float32)
    return 1.0 / (factors_R2 * _wavelengths(rope))
