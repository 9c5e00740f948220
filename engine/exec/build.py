"""From options to a running core: the composition root of the engine process.

Everything that can be refused is refused before the first allocation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config import EngineConfig, EngineOptions, ModelFacts, resolve
from engine.core import EngineCore
from engine.errors import ModelError
from engine.exec import device as devices
from engine.exec.executor import LocalExecutor
from engine.exec.kv_store import KVStore
from engine.exec.rows import Rows
from engine.model.checkpoint import Checkpoint, open_checkpoint
from engine.model.loader import load_model
from engine.model.transformer import Transformer
from engine.plan import RowStart, SequencePlan, StepPlan
from engine.sample.sampler import Sampler
from engine.types import EngineInfo, SamplingParams
from kernels import api

Progress = Callable[[int, int], None]


def build(options: EngineOptions, progress: Progress | None = None) -> tuple[EngineCore, EngineInfo]:
    """Loads the model and makes the core around it.

    Args:
        options: what the user asked.
        progress: called with (bytes loaded, bytes in all) while weights load.

    Raises:
        ConfigError: in one line for the operator.
    """
    device = devices.choose(options.device)
    checkpoint = open_checkpoint(options.model)
    config = resolve(options, model_facts(checkpoint), devices.measure(device))
    executor, weight_bytes = build_executor(config, checkpoint, device, progress)
    warm_up(executor)
    return EngineCore(config, executor), engine_info(config, checkpoint, device, weight_bytes)


def build_executor(
    config: EngineConfig, checkpoint: Checkpoint, device: torch.device, progress: Progress | None = None
) -> tuple[LocalExecutor, int]:
    """Allocates weights, KV memory and rows. Returns the executor and the weights' bytes."""
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    model = load_model(
        checkpoint, dtype=dtype, device=device, max_model_len=config.model.max_model_len, progress=progress
    )
    spec = checkpoint.spec
    store = KVStore(
        config.cache,
        num_layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
    )
    num_rows = config.scheduler.max_num_seqs
    max_blocks = -(-config.model.max_model_len // config.cache.block_size) + 1
    rows = Rows(num_rows, max_blocks, device)
    sampler = Sampler(num_rows, spec.vocab_size, config.model.eos_token_ids, device)
    return LocalExecutor(model, store, rows, sampler), weight_bytes(model)
