"""Launch shapes of the attention kernels, by head size and the memory's dtype: nothing tunes at run time.

The defaults are by generation, from what compiles without spills and fits the shared memory
(`benchmarks/gpu_compile.py`, which CI runs for sm_80, sm_89 and sm_90). A table in `kernels/tuning/`
overrides them for a GPU on which they were measured.
"""
# mypy: ignore-errors

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from kernels.kv_format import is_eight_bit
from kernels.tuning.device import hopper, multiprocessors, roomy
from kernels.tuning.tables import tuned


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """`tile` keys per step, and how finely contexts are split over the device.

    Attributes:
        min_chunk_tokens: a part has no fewer, unless its sequence has.
        programs_per_sm: what the parts of all sequences and kv heads should come to. 0 cuts each sequence by
            its own length alone, into at most OWN_PARTS.
        target_programs: that, of the whole device.
        last_merges: the program that finishes a sequence's last part merges them, not a second kernel.
    """

    tile: int
    warps: int
    stages: int
    min_chunk_tokens: int = 256
    programs_per_sm: int = 8
    target_programs: int = 0
    last_merges: bool = True

    @property
    def min_chunk_tiles(self) -> int:
        return max(1, self.min_chunk_tokens // self.tile)

    @property
    def parts_by_own_length(self) -> int:
        """0, or the most parts of a sequence."""
        return 0 if self.programs_per_sm else OWN_PARTS


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """`rows` (token, head) pairs per program, `tile` keys per step.

    Attributes:
        registers: at most so many per thread; None leaves it to the assembler.
    """

    rows: int
    tile: int
    warps: int
    stages: int
    registers: int | None = None


# Deterministic mode: 16 parts of 8k tokens keep 128 programs busy for 8 kv heads; more would cost scratch.
OWN_PARTS, OWN_CHUNK_TOKENS = 32, 512


@functools.cache
def decode_config(
    head_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool = False
) -> DecodeConfig:
    """Picks decode's launch shape: 32 KB of keys and values per stage, of which two are in shared memory.

    Three programs fit an H200's SM then, with 64 to 128 KB of reads under way. A part below 256 tokens costs
    more to start than to read; eight programs per SM in all keep the last round's idle share small.
    """
    if dtype == torch.float32:
        tile, stages = 16, 2
    else:
        tile, stages = 64 if head_dim <= 128 else 32, 3
    # fp32 tensors of wide heads fill the registers of 4 warps, and spill.
    warps = 8 if dtype == torch.float32 and head_dim > 128 else 4
    config = DecodeConfig(tile, warps, stages)
    config = replace(config, **tuned(device, "decode", tuning_key(head_dim, dtype)))
    if deterministic:
        return replace(config, programs_per_sm=0, min_chunk_tokens=OWN_CHUNK_TOKENS)
    return replace(config, target_programs=config.programs_per_sm * multiprocessors(device))


@functools.cache
def prefill_config(head_dim: int, dtype: torch.dtype, device: torch.device, long: bool) -> PrefillConfig:
    """Picks prefill's launch shape; `long` when the longest sequence fills more than 64 rows."""
    key = tuning_key(head_dim, dtype) + (" long" if long else " short")
    return replace(_prefill_default(head_dim, dtype, device, long), **tuned(device, "prefill", key))


def _prefill_default(head_dim: int, dtype: torch.dtype, device: torch.device, long: bool) -> PrefillConfig:
    if dtype == torch.float32:
        return PrefillConfig(rows=32, tile=16, warps=8, stages=1)
    if head_dim > 128:
        return _prefill_wide(device)
    if not hopper(device) and (head_dim & (head_dim - 1) or not long):
        return PrefillConfig(rows=64, tile=32, warps=4, stages=3)
    if long:
        # Without tensor cores that read shared memory, 64 keys of scores beside the accumulator spill.
        tile = 64 if hopper(device) or head_dim <= 64 else 32
        return PrefillConfig(rows=128, tile=tile, warps=8, stages=3)
    return PrefillConfig(rows=64, tile=64, warps=4, stages=3)


def _prefill_wide(device: torch.device) -> PrefillConfig:
    """For heads of more than 128: 32 KB of keys and values per stage, and the queries beside them."""
    if hopper(device):
        # 128 rows of accumulator fit the registers only where tensor cores read operands from shared memory.
        return PrefillConfig(rows=128, tile=32, warps=8, stages=3)
    if roomy(device):
        return PrefillConfig(rows=64, tile=32, warps=8, stages=3)
    # 64 rows of queries are 1 KB too much. Left to itself the assembler spills to make it 3 programs per SM,
    # where shared memory has room for one.
    return PrefillConfig(rows=32, tile=32, warps=4, stages=3, registers=255)


def tuning_key(head_dim: int, dtype: torch.dtype) -> str:
    """What a tuning table calls this shape."""
    return f"{head_dim} {'8 bits' if is_eight_bit(dtype) else str(dtype).removeprefix('torch.')}"
