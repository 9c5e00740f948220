"""From options to a running core: the composition root of the engine process.

Everything that can be refused is refused before the first allocation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

import torch

from engine.config import EngineConfig, EngineOptions, ModelFacts, Quantization, resolve
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.exec import device as devices
from engine.exec.decode import DecodeStep
from engine.exec.executor import LocalExecutor
from engine.exec.graphed import GraphedDecode
from engine.exec.graphs import CudaGraphs, GraphMaker
from engine.exec.kv_store import KVStore
from engine.exec.lanes import Lanes
from engine.exec.rows import Rows
from engine.exec.warm_up import warm_up
from engine.gguf.container import SUFFIX, is_gguf
from engine.model import checkpoint as checkpoints
from engine.model import loader
from engine.model.checkpoint import LOADABLE, Checkpoint
from engine.model.embeddings import read_embedding_facts
from engine.model.quant import holding
from engine.model.transformer import Transformer
from engine.sample.grammar import CompiledGrammars
from engine.sample.sampler import Sampler
from engine.text.tokenizer import Tokenizer
from engine.types import EngineInfo
from kernels import api

Progress = Callable[[int, int], None]
_STORED = {"BF16": "bfloat16", "F16": "float16"}


def build(options: EngineOptions, progress: Progress | None = None) -> tuple[EngineCore, EngineInfo]:
    """Loads the model and makes the core around it.

    Args:
        options: what the user asked.
        progress: called with (bytes loaded, bytes in all) while weights load.

    Raises:
        ConfigError: in one line for the operator.
    """
    device = devices.choose(options.device)
    machine = devices.measure(device)
    checkpoint = checkpoints.inspect(options.model)
    if machine.converts_fp8:
        checkpoint = checkpoint.keeping_fp8()
    quantization = _quantization(options)
    facts = model_facts(checkpoint, device, quantization)
    config = resolve(options, facts, machine)
    grammars = build_grammars(config, checkpoint)
    executor = build_executor(config, checkpoint, device, progress)
    warm_up(executor, config)
    return EngineCore(config, executor, grammars=grammars), engine_info(config, checkpoint, facts, device)


def _quantization(options: EngineOptions) -> Quantization | None:
    if options.quantization is None:
        return None
    try:
        return Quantization.parse(options.quantization)
    except ValueError as error:
        raise ConfigError(f"--quantization {options.quantization}: {error}.") from None


def model_facts(
    checkpoint: Checkpoint, device: torch.device, quantization: Quantization | None = None
) -> ModelFacts:
    """What `resolve` needs to know of a checkpoint on this device."""
    spec = checkpoint.spec
    parameters, integer_bytes = holding.memory(checkpoint.slots, checkpoint.stored, quantization)
    tied = spec.lm_head and spec.tied_embeddings
    if tied and quantization is not None:
        head = holding.rounding("lm_head", spec.hidden_size, quantization)
        integer_bytes += head.num_bytes(spec.vocab_size, spec.hidden_size)
    elif tied and device.type == "cpu":
        parameters += spec.vocab_size * spec.hidden_size  # packed for the output, in rows for the look-up
    return ModelFacts(
        name=PurePath(checkpoint.name.removesuffix(SUFFIX)).name or checkpoint.name,
        vocab_size=spec.vocab_size,
        eos_token_ids=checkpoint.eos_token_ids,
        max_positions=spec.max_positions,
        checkpoint_dtype=_float_dtype(checkpoint),
        num_parameters=parameters,
        kv_rows_per_token=2 * spec.num_layers * spec.num_kv_heads,
        head_dim=spec.head_dim,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.mlp_size,
        integer_bytes=integer_bytes,
        quantization=quantization,
        embeddings=read_embedding_facts(checkpoint),
    )


def _float_dtype(checkpoint: Checkpoint) -> str:
    """What most tensors in floats are in; "" where it is the same for models of every type."""
    if is_gguf(checkpoint.path) and checkpoint.stored:
        return ""  # scales are fp16 and norms fp32
    dtypes = [tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in LOADABLE]
    return _STORED.get(max(set(dtypes), key=dtypes.count), "float32")


def build_executor(
    config: EngineConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    progress: Progress | None = None,
    graph_maker: GraphMaker | None = None,
) -> LocalExecutor:
    """Loads the weights and allocates everything else.

    Args:
        graph_maker: captures decode steps; chosen by the config if not given.
    """
    if device.type == "cpu":
        api.use_threads(config.threads)
    model = loader.load(
        checkpoint,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=device,
        max_model_len=config.model.max_model_len,
        deterministic=config.model.deterministic,
        progress=progress,
    )
    if graph_maker is None and config.cuda_graphs:
        graph_maker = CudaGraphs()
    return assemble(config, model, graph_maker)


def assemble(config: EngineConfig, model: Transformer, graph_maker: GraphMaker | None) -> LocalExecutor:
    """Allocates KV memory, rows and sampling state around a model."""
    spec, device = model.spec, model.device
    store = KVStore(
        config.cache,
        num_layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        device=device,
    )
    num_rows = config.scheduler.max_num_seqs
    max_blocks = -(-config.model.max_model_len // config.cache.block_size) + 1
    rows = Rows(num_rows, max_blocks, device)
    sampler = Sampler(num_rows, spec.vocab_size, config.model.eos_token_ids, device)
    graphs = None
    if graph_maker is not None and spec.lm_head:
        step = DecodeStep(model, store, rows, sampler, num_rows)
        graphs = GraphedDecode(step, Lanes(rows, num_rows), sampler, graph_maker, num_rows)
    return LocalExecutor(model, store, rows, sampler, graphs)


def build_grammars(config: EngineConfig, checkpoint: Checkpoint) -> CompiledGrammars:
    """Where the checkpoint has no tokenizer, grammars are refused; ids alone do without."""
    return CompiledGrammars(
        lambda: Tokenizer.from_dir(checkpoint.path), config.model.vocab_size, config.model.eos_token_ids
    )


def engine_info(
    config: EngineConfig, checkpoint: Checkpoint, facts: ModelFacts, device: torch.device
) -> EngineInfo:
    cache, scheduler = config.cache, config.scheduler
    return EngineInfo(
        model=config.model.name,
        architecture=checkpoint.architecture,
        dtype=config.model.dtype,
        device=config.model.device,
        backend=api.backend_name(device),
        vocab_size=config.model.vocab_size,
        max_model_len=config.model.max_model_len,
        eos_token_ids=config.model.eos_token_ids,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        kv_dtype=cache.dtype,
        weight_bytes=facts.weight_bytes(config.model.dtype),
        kv_bytes=cache.num_blocks * cache.bytes_per_block,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_queued_requests=scheduler.max_queued_requests,
        prefix_caching=cache.prefix_caching,
        embeddings=config.model.embeddings,
        largest_request_tokens=min((cache.num_blocks - 1) * cache.block_size, config.model.max_model_len),
        reasons=config.reasons,
        quantization=_held(checkpoint, config.model.quantization),
    )


def _held(checkpoint: Checkpoint, asked: Quantization | None) -> str:
    """How weights are held in few bits, for the start-up report."""
    found = [weight for weight in checkpoint.stored.values() if not weight.is_widened]
    forms = sorted({"fp8" if weight.is_float else f"int{weight.value.bits}" for weight in found})
    parts = [f"{checkpoint.format} {' and '.join(forms)}"] if forms else []
    if asked is not None:
        parts.append(f"{asked} of {'the others' if forms else 'all linears'}")
    return ", ".join(parts)
