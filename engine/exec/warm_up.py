"""The steps before the first request, so that it does not pay for what is built when it is first needed: the
primitives of a CPU's libraries, the kernels of a GPU. All of them write to the padding block.

On a GPU the steps are rehearsed, for all their kernels to be compiled at the same time. The kernels of graphs
follow, while the server already answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from engine.config import EngineConfig
from engine.exec.device import count_cores
from engine.exec.executor import LocalExecutor
from engine.plan import RowStart, SequencePlan, StepPlan
from engine.types import SamplingParams

log = logging.getLogger(__name__)

_SAMPLED, _GREEDY = SamplingParams(temperature=1.0), SamplingParams(temperature=0.0)
_FILTERED = SamplingParams(temperature=1.0, top_p=0.9)
# Prefill kernels have one shape for a few tokens, and another above 64.
_FEW_TOKENS, _MANY_TOKENS = 2, 65
# A context that attention splits.
_LONG_CONTEXT = 2048


def warm_up(executor: LocalExecutor, config: EngineConfig) -> None:
    """Runs the steps; returns when all that a first request needs is there."""
    plans = [_plan(executor, config, _FILTERED, 1)]
    if config.model.device == "cuda":
        plans += _for_kernels(executor, config)
        _rehearse(executor, plans)
    for plan in plans:
        executor.warm_up(plan)


def _rehearse(executor: LocalExecutor, plans: Sequence[StepPlan]) -> None:
    """What fails here is only lost time: a kernel that cannot be compiled will say so when it is launched."""
    try:
        executor.rehearse(plans, count_cores())
    except Exception:
        log.warning("could not compile kernels ahead; each will be compiled when it is needed", exc_info=True)


def _for_kernels(executor: LocalExecutor, config: EngineConfig) -> Iterator[StepPlan]:
    """A plan for each kernel that attention and the draw choose between."""
    yield _plan(executor, config, _SAMPLED, _MANY_TOKENS)
    yield _plan(executor, config, _GREEDY, _FEW_TOKENS)
    yield _plan(executor, config, _FILTERED, 1, start=_LONG_CONTEXT - 1)


def _plan(
    executor: LocalExecutor, config: EngineConfig, params: SamplingParams, num_tokens: int, start: int = 0
) -> StepPlan:
    """One sequence of padding, of as many tokens as the model takes."""
    most = config.model.max_model_len
    num_tokens = min(num_tokens, most)
    start = min(start, most - num_tokens)
    blocks = -(-(start + num_tokens) // config.cache.block_size)
    return StepPlan(
        step=0,
        row_starts=(RowStart(0, params, 0, 1, (0,), ()),),
        sequences=(SequencePlan(0, start, num_tokens, (0,) * num_tokens, (0,) * blocks, executor.samples),),
    )
