"""Engine cores for tests: a real executor on the CPU with a pool of a chosen size, and a loop to run it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from engine.build import build_executor
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.exec.graphs import GraphMaker
from engine.model.checkpoint import inspect
from engine.model.embeddings import read_embedding_facts
from engine.plan import StepPlan, TokenMasks
from engine.types import FinishReason, SamplingParams, TokenLogprob, TokenOutput

# What a step does by hand for the few that ask: outside a graph, or in one of its own.
OF_EVERY_KIND = [
    ("biased", [4, 5], SamplingParams(max_tokens=9, seed=1, logit_bias={7: 2.0}, min_tokens=3)),
    ("penalised", [4, 5], SamplingParams(max_tokens=9, seed=1, presence_penalty=0.5, logprobs=3)),
    ("narrow", [4, 5], SamplingParams(max_tokens=9, seed=1, allowed_token_ids=(3, 8, 9, 30))),
    ("banned", [4, 5], SamplingParams(max_tokens=9, seed=1, banned_sequences=((5,), (3, 4)))),
]


def make_core(
    path: Path,
    *,
    num_blocks: int = 128,
    block_size: int = 16,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    max_model_len: int = 256,
    prefix_caching: bool = True,
    steps_ahead: int = 1,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    device: str = "cpu",
    graph_maker: GraphMaker | None = None,
    deterministic: bool = False,
) -> EngineCore:
    """A core around the checkpoint at `path`; every limit can be made small. On CUDA it has graphs."""
    checkpoint = inspect(str(path))
    spec = checkpoint.spec
    config = EngineConfig(
        model=ModelConfig(
            name="test", dtype=dtype, device=device, max_model_len=max_model_len,
            vocab_size=spec.vocab_size, eos_token_ids=checkpoint.eos_token_ids, seed=0,
            embeddings=read_embedding_facts(checkpoint), deterministic=deterministic,
        ),
        cache=CacheConfig(block_size, num_blocks, 1, prefix_caching, kv_dtype or dtype),
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens, 1000, steps_ahead),
        cuda_graphs=device == "cuda",
    )  # fmt: skip
    executor = build_executor(config, checkpoint, torch.device(device), graph_maker=graph_maker)
    return EngineCore(config, executor)


class Stream:
    """What one choice produced."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.embedding: bytes | None = None

    def add(self, output: TokenOutput) -> None:
        assert self.finish_reason is None, "a token after the end"
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
        if output.logprob is not None:
            self.logprobs.append(output.logprob)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.cached_tokens = output.cached_tokens
        self.finish_reason = output.finish_reason
        self.embedding = output.embedding


def run(
    core: EngineCore, requests: Iterable[tuple[str, list[int], SamplingParams]], *, max_steps: int = 20_000
) -> dict[tuple[str, int], Stream]:
    """Adds the requests, steps until nothing is left, and returns the stream of every choice."""
    streams: dict[tuple[str, int], Stream] = defaultdict(Stream)
    for request_id, prompt_ids, params in requests:
        core.add(request_id, prompt_ids, params)
    for _ in range(max_steps):
        if not core.has_work:
            break
        for output in core.step():
            streams[output.request_id, output.index].add(output)
    assert not core.has_work, f"still at work after {max_steps} steps"
    return dict(streams)


def guard_launches(core: EngineCore, guard: Callable[[], AbstractContextManager[object]]) -> list[int]:
    """From now on the executor's `forward` and `sample` run under `guard`; the steps that did are noted."""
    executor: Any = core._executor
    forward, sample = executor.forward, executor.sample
    launched: list[int] = []

    def guarded_forward(plan: StepPlan) -> None:
        launched.append(plan.step)
        with guard():
            forward(plan)

    def guarded_sample(plan: StepPlan, masks: TokenMasks | None = None) -> object:
        with guard():
            return sample(plan, masks)

    executor.forward, executor.sample = guarded_forward, guarded_sample
    return launched
