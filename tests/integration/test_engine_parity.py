"""The whole engine against `transformers`: the same greedy tokens and log probabilities, whatever the batch,
the chunking, the cache or the preemptions.

    pytest tests/integration/test_engine_parity.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.types import SamplingParams
from tests.helpers.checkpoints import ALL_CONFIGS, make_checkpoint, reference_generate
from tests.helpers.engines import Stream, make_core, run

NUM_TOKENS = 64
PROMPTS = {
    "short": [5, 17, 3],
    "one-block": list(range(10, 26)),
    "long": [(7 * i + 3) % 90 + 5 for i in range(45)],
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)

Expected = dict[str, tuple[list[int], list[float]]]


@pytest.fixture(scope="module", params=ALL_CONFIGS, ids=lambda config: config.id)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    """A checkpoint and what transformers generates from it."""
    config = request.param
    path = make_checkpoint(tmp_path_factory.mktemp("model"), config.family, **config.overrides)
    return path, {name: reference_generate(path, ids, NUM_TOKENS) for name, ids in PROMPTS.items()}


def assert_same(stream: Stream, expected: tuple[list[int], list[float]]) -> None:
    token_ids, logprobs = expected
    assert stream.token_ids == token_ids
    assert [entry.logprob for entry in stream.logprobs] == pytest.approx(logprobs, abs=1e-4)


def test_alone(case: tuple[Path, Expected]) -> None:
    path, expected = case
    for name, prompt in PROMPTS.items():
        streams = run(make_core(path), [(name, prompt, GREEDY)])
        assert_same(streams[name, 0], expected[name])


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_mixed_batch(case: tuple[Path, Expected], steps_ahead: int) -> None:
    path, expected = case
    core = make_core(path, steps_ahead=steps_ahead)
    sampled = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=40, presence_penalty=0.5)
    streams = run(
        core, [*((name, prompt, GREEDY) for name, prompt in PROMPTS.items()), ("other", [9] * 20, sampled)]
    )
    for name in PROMPTS:
        assert_same(streams[name, 0], expected[name])


def test_chunked_prefill(case: tuple[Path, Expected]) -> None:
    path, expected = case
    core = make_core(path, max_num_batched_tokens=7, max_num_seqs=3)
    streams = run(core, [(name, prompt, GREEDY) for name, prompt in PROMPTS.items()])
    for name in PROMPTS:
        assert_same(streams[name, 0], expected[name])


def test_prefix_hit(case: tuple[Path, Expected]) -> None:
    path, expected = case
    core = make_core(path)
    first = run(core, [("first", PROMPTS["long"], GREEDY)])["first", 0]
    second = run(core, [("second", PROMPTS["long"], GREEDY)])["second", 0]
    assert first.cached_tokens == 0
    assert second.cached_tokens == 32  # two full blocks of 16; the tail is computed again
    assert_same(second, expected["long"])


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_after_preemption(case: tuple[Path, Expected], steps_ahead: int) -> None:
    path, expected = case
    # 45 + 64 tokens need 7 blocks of 16; two such requests cannot both finish in 10.
    core = make_core(path, num_blocks=11, prefix_caching=False, steps_ahead=steps_ahead)
    streams = run(core, [(f"r{i}", PROMPTS["long"], GREEDY) for i in range(2)])
    assert core.snapshot().preemptions > 0
    for i in range(2):
        assert_same(streams[f"r{i}", 0], expected["long"])


def test_four_choices(case: tuple[Path, Expected]) -> None:
    path, expected = case
    core = make_core(path)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0, n=4)
    streams = run(core, [("n4", PROMPTS["long"], params)])
    for index in range(4):
        assert_same(streams["n4", index], expected["long"])
    # The prompt once, and its last token once more for each other choice.
    assert core.snapshot().prompt_tokens <= len(PROMPTS["long"]) + 3
