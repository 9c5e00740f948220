"""The workload of `benchmarks.engine` in transformers' continuous batching: the easy thing to do instead.

The same lengths and the same shape of model, with random weights of its own. It is asked for CUDA graphs and
for its asynchronous loop, which it chooses by itself where they help.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.models import CONFIGS
from engine.types import SamplingParams

_CLASSES = {
    "LlamaForCausalLM": ("LlamaConfig", "LlamaForCausalLM"),
    "Qwen3ForCausalLM": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def run(
    args: argparse.Namespace, requests: Sequence[tuple[list[int], SamplingParams]], device: torch.device
) -> dict[str, Any]:
    """Throughput, or why there is none."""
    try:
        return _run(args, requests, device)
    except Exception as error:  # somebody else's code: its failure is a finding, not ours
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _run(
    args: argparse.Namespace, requests: Sequence[tuple[list[int], SamplingParams]], device: torch.device
) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        model = _model(transformers, args, device)
        generation = transformers.GenerationConfig(
            do_sample=True, temperature=args.temperature, top_k=0, eos_token_id=-1, pad_token_id=0
        )
        with model.continuous_batching_context_manager(generation_config=generation) as manager:
            _serve(manager, requests[:4], args.max_seconds)
            started = time.perf_counter()
            tokens = _serve(manager, requests, args.max_seconds)
            seconds = time.perf_counter() - started
    return {
        "version": transformers.__version__,
        "attention": model.config._attn_implementation,
        "seconds": seconds,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / seconds,
    }


def _model(transformers: Any, args: argparse.Namespace, device: torch.device) -> Any:
    config = dict(CONFIGS[args.model])
    config_class, model_class = _CLASSES[config.pop("architectures")[0]]
    with torch.device(device):
        model = getattr(transformers, model_class)._from_config(
            getattr(transformers, config_class)(**config), dtype=getattr(torch, args.dtype)
        )
    return model.eval()


def _serve(manager: Any, requests: Sequence[tuple[list[int], SamplingParams]], deadline_s: float) -> int:
    """Submits all at once; returns how many tokens came back."""
    until = time.monotonic() + deadline_s
    for prompt, params in requests:
        manager.add_request(prompt, max_new_tokens=params.max_tokens)
    tokens = done = 0
    while done < len(requests):
        result = manager.get_result(timeout=1.0)
        if result is not None and result.is_finished():
            tokens += len(result.generated_tokens)
            done += 1
        elif time.monotonic() > until or not manager.is_running():
            raise TimeoutError(f"{done} of {len(requests)} requests ended")
    return tokens
