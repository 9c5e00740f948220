"""`--deterministic` through the whole engine: a request's tokens and log probabilities alone and in a batch.

    pytest tests/integration/test_engine_deterministic.py

On a CPU with fake graphs; with a CUDA device (marker `gpu`) on the Triton kernels, in bf16, with CUDA graphs.
Needs none of the server's dependencies.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.core import EngineCore
from engine.types import SamplingParams, StepRun
from kernels import api
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.engines import Stream, make_core, run
from tests.helpers.fake_graphs import FakeGraphs

PROMPT = [(7 * i + 3) % 90 + 5 for i in range(61)]
ASKED = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0),
    SamplingParams(temperature=0.9, top_p=0.9, top_k=20, seed=5, max_tokens=40, ignore_eos=True, logprobs=0),
]
# Of all lengths, so that the batch grows and shrinks around the request that is looked at.
CROWD = [
    (
        f"other-{i}",
        [(11 * i + j) % 90 + 5 for j in range(3 + 9 * i)],
        SamplingParams(temperature=1.0, seed=i, max_tokens=8 + 6 * i, ignore_eos=True),
    )
    for i in range(6)
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    device: str = request.param
    if device == "cpu" and not api.is_native():
        pytest.skip("without the native library a CPU does not promise it")
    return device


def core_on(device: str, path: Path, max_num_batched_tokens: int = 512) -> EngineCore:
    """Without prefix caching: of a hit one token may be left, which other kernels compute."""
    return make_core(
        path,
        device=device,
        dtype="bfloat16",
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_caching=False,
        steps_ahead=2,
        graph_maker=FakeGraphs() if device == "cpu" else None,
        deterministic=True,
    )


def said(stream: Stream) -> tuple[list[int], list[float]]:
    return stream.token_ids, [entry.logprob for entry in stream.logprobs]


@pytest.mark.parametrize("asked", ASKED, ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_alone_and_in_a_batch(device: str, family: str, asked: SamplingParams, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, family)
    eager = core_on(device, path)
    alone = said(run(eager, [("r", PROMPT, asked)])["r", 0])
    assert len(alone[0]) == len(alone[1]) == 40
    assert eager.snapshot().step_runs[StepRun.UNCAPTURED] > 0

    # The crowd's prompts share steps with this one's, which is cut in other places.
    crowd = core_on(device, path, max_num_batched_tokens=48)
    for _ in range(2):  # what the first round misses is captured before the second
        before = dict(crowd.snapshot().step_runs)
        assert said(run(crowd, [*CROWD[:3], ("r", PROMPT, asked), *CROWD[3:]])["r", 0]) == alone
        assert said(run(crowd, [("r", PROMPT, asked)])["r", 0]) == alone
        while crowd.prepare():
            pass
    runs = crowd.snapshot().step_runs
    assert runs[StepRun.GRAPH] - before[StepRun.GRAPH] > 60
    assert runs[StepRun.UNCAPTURED] == before[StepRun.UNCAPTURED]
