"""Configuration: what the user asked (EngineOptions) and what was decided (EngineConfig).

Both are frozen. `resolve` turns one into the other before anything is allocated, from facts that others
measured (the checkpoint's, the machine's), and keeps the reason of every automatic value. It reads no
files, no environment and no device.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user asked. None means "choose for me"."""

    model: str
    served_model_name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_queued_requests: int | None = None
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    prefix_caching: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which weights, in which type, on which device."""

    path: str
    name: str
    dtype: str  # "bfloat16" | "float16" | "float32"
    device: str  # "cpu" | "cuda"
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The block pool. Block 0 is padding and is never handed out, so num_blocks - 1 hold tokens."""

    block_size: int
    num_blocks: int
    bytes_per_block: int
    prefix_caching: bool


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queue.

    Attributes:
        steps_ahead: steps launched before the oldest one's tokens are read: 1 on CPU, 2 on CUDA.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    steps_ahead: int = 1


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """This process among those that share one model."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything decided, and why."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig = ParallelConfig()
    reasons: tuple[tuple[str, str, str], ...] = ()
