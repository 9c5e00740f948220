"""Launch shapes of the attention kernels, by head size and dtype: nothing tunes at run time.

`tests/kernels/test_compile.py` compiles each for sm_80 and sm_90 and checks registers and shared memory.
"""
# mypy: ignore-errors

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """`tile` keys per step, and how finely contexts are split over the device."""

    tile: int
    warps: int
    stages: int
    min_chunk_tiles: int
    target_programs: int


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """`rows` (token, head) pairs per program, `tile` keys per step."""

    rows: int
    tile: int
    warps: int
    stages: int


# The least context that a program of its own is worth: below it, start-up costs more than the reads.
MIN_CHUNK_TOKENS = 256
# Programs per SM to aim for. Three are resident; eight in all keep the last round's idle share small.
PROGRAMS_PER_SM = 8


@functools.cache
def decode_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> DecodeConfig:
    """Picks decode's launch shape: 32 KB of keys and values per stage, of which two are in shared memory.

    Three programs fit an H200's SM then, with 64 to 128 KB of reads under way.
    """
    if dtype == torch.float32:
        tile, stages = 16, 2
    else:
        tile, stages = 64 if head_dim <= 128 else 32, 3
    return DecodeConfig(
        tile=tile,
        warps=4,
        stages=stages,
        min_chunk_tiles=MIN_CHUNK_TOKENS // tile,
        target_programs=PROGRAMS_PER_SM * _multiprocessors(device),
    )


@functools.cache
def prefill_config(head_dim: int, dtype: torch.dtype, device: torch.device, long: bool) -> PrefillConfig:
    """Picks prefill's launch shape; `long` when the longest sequence fills more than 64 rows."""
    if dtype == torch.float32:
        return PrefillConfig(rows=32, tile=16, warps=8, stages=1)
    if head_dim > 128:
        # 128 rows of accumulator fit the registers only where tensor cores read operands from shared memory.
        return PrefillConfig(rows=128 if _hopper(device) else 64, tile=32, warps=8, stages=2)
    if head_dim & (head_dim - 1) and not _hopper(device):
        return PrefillConfig(rows=64, tile=32, warps=4, stages=3)
    if long:
        return PrefillConfig(rows=128, tile=64, warps=8, stages=3)
    return PrefillConfig(rows=64, tile=64, warps=4, stages=3)


def _hopper(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
