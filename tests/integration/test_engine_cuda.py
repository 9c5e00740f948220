"""The engine on a GPU, with the Triton kernels, one step ahead: the same tokens as `transformers` on the CPU.

    pytest -m gpu tests/integration/test_engine_cuda.py

Needs torch, triton and transformers, and none of the server's dependencies: see benchmarks/gpu.sh.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.embedding import Pooling, PoolingKind
from engine.types import SamplingParams, StepRun
from tests.helpers.checkpoints import (
    ALL_CONFIGS,
    TinyConfig,
    make_checkpoint,
    reference_embedding,
    reference_generate,
)
from tests.helpers.engines import OF_EVERY_KIND, Stream, guard_launches, make_core, run

pytestmark = pytest.mark.gpu

NUM_TOKENS = 48
PROMPTS = {"short": [5, 17, 3], "long": [(7 * i + 3) % 90 + 5 for i in range(45)]}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
# One of each family is enough here: what a spec means is settled on the CPU.
FAMILIES = {config.family: config for config in ALL_CONFIGS}.values()

Expected = dict[str, tuple[list[int], list[float]]]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda config: config.id)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    config: TinyConfig = request.param
    path = make_checkpoint(tmp_path_factory.mktemp("model"), config.family, **config.overrides)
    return path, {name: reference_generate(path, ids, NUM_TOKENS) for name, ids in PROMPTS.items()}


def assert_same(stream: Stream, expected: tuple[list[int], list[float]]) -> None:
    token_ids, logprobs = expected
    assert stream.token_ids == token_ids
    assert [entry.logprob for entry in stream.logprobs] == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("steps_ahead", [1, 2])
@pytest.mark.parametrize("block_size", [16, 64])
def test_mixed_batch_in_chunks(case: tuple[Path, Expected], block_size: int, steps_ahead: int) -> None:
    path, expected = case
    core = make_core(
        path, device="cuda", block_size=block_size, max_num_batched_tokens=24, steps_ahead=steps_ahead
    )
    sampled = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=40, seed=3, max_tokens=40, presence_penalty=0.5, logprobs=3
    )
    others = [(name, prompt, GREEDY) for name, prompt in PROMPTS.items()]
    streams = run(core, [*others, ("other", [9] * 20, sampled)])
    for name in PROMPTS:
        assert_same(streams[name, 0], expected[name])
    assert len(streams["other", 0].token_ids) == 40


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_graphs_say_what_launches_say(case: tuple[Path, Expected], steps_ahead: int) -> None:
    """Every decode step as a graph, in batches that shrink; penalties and filters among them."""
    path, expected = case
    sampled = SamplingParams(
        temperature=1.0, top_p=0.9, seed=3, max_tokens=40, ignore_eos=True, presence_penalty=0.5, logprobs=0
    )
    requests = [(name, prompt, GREEDY) for name, prompt in PROMPTS.items()]
    requests += [(f"other-{i}", [9 + i] * 20, replace(sampled, seed=i)) for i in range(3)]
    core = make_core(path, device="cuda", steps_ahead=steps_ahead)
    for _ in range(3):  # what is missed is captured then: every size, with penalties and log probabilities
        while core.prepare():
            pass
        before = dict(core.snapshot().step_runs)
        streams = run(core, requests)
        for name in PROMPTS:
            assert_same(streams[name, 0], expected[name])
    runs = core.snapshot().step_runs
    assert runs[StepRun.GRAPH] - before[StepRun.GRAPH] > 30
    assert runs[StepRun.UNCAPTURED] == before[StepRun.UNCAPTURED]


def test_prefix_hits_choices_and_preemption(case: tuple[Path, Expected]) -> None:
    path, expected = case
    core = make_core(path, device="cuda", num_blocks=17, steps_ahead=2)
    four = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0, n=4)
    streams = run(core, [("a", PROMPTS["long"], four), ("b", PROMPTS["long"], GREEDY)])
    again = run(core, [("again", PROMPTS["long"], GREEDY)])["again", 0]
    for stream in (*streams.values(), again):
        assert_same(stream, expected["long"])
    assert again.cached_tokens == 32
    assert core.snapshot().preemptions > 0


@pytest.mark.parametrize("kind", PoolingKind)
def test_embeddings_in_chunks_beside_text(case: tuple[Path, Expected], kind: PoolingKind) -> None:
    path, expected = case
    core = make_core(path, device="cuda", max_num_batched_tokens=24, steps_ahead=2)
    vector = SamplingParams(max_tokens=0, pooling=Pooling(kind))
    streams = run(core, [("text", PROMPTS["long"], GREEDY), ("vector", PROMPTS["long"], vector)])
    alone = run(core, [("alone", PROMPTS["long"], vector)])["alone", 0]
    assert_same(streams["text", 0], expected["long"])
    wanted = reference_embedding(path, PROMPTS["long"], kind)
    for stream in (streams["vector", 0], alone):
        found = np.frombuffer(stream.embedding or b"", "<f4")
        np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_a_seed_gives_the_same_tokens_as_on_the_cpu(case: tuple[Path, Expected]) -> None:
    path, _ = case
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=24, ignore_eos=True)
    tokens = {
        device: run(make_core(path, device=device), [("r", PROMPTS["long"], params)])["r", 0].token_ids
        for device in ("cpu", "cuda")
    }
    assert tokens["cuda"] == tokens["cpu"]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Torch raises where it would make the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_sees_a_host_that_waits() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation():
        torch.ones(1, device="cuda").item()


def test_launching_a_step_never_waits(case: tuple[Path, Expected]) -> None:
    """Prompts and decodes, as graphs and launch by launch, drawn with every kind of parameters.

    Kernels are compiled and graphs captured before, for which one may wait. On a CPU
    `tests/unit/test_exec_graphs.py` looks for the same.
    """
    path, _ = case
    requests = [(name, prompt, replace(GREEDY, max_tokens=12)) for name, prompt in PROMPTS.items()]
    sampled = SamplingParams(top_p=0.9, top_k=8, seed=3, max_tokens=12, ignore_eos=True, n=2)
    requests.append(("sampled", [9] * 18, sampled))
    core = make_core(path, device="cuda", steps_ahead=2)
    for _ in range(2):
        for each in (requests, OF_EVERY_KIND):
            run(core, each)
        while core.prepare():
            pass
    before = dict(core.snapshot().step_runs)
    launched = guard_launches(core, no_synchronisation)
    for each in (requests, OF_EVERY_KIND):
        run(core, each)
    runs = core.snapshot().step_runs
    assert len(launched) > 20
    assert runs[StepRun.GRAPH] > before[StepRun.GRAPH]
    assert runs[StepRun.UNCAPTURED] == before[StepRun.UNCAPTURED]
