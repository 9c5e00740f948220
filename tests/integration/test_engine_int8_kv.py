"""The engine over an int8 KV cache: how a request is scheduled changes none of its tokens.

Keys and values are read back as they were rounded, also by the step that wrote them, so chunks, prefix hits
and preemptions see the same numbers. What the rounding costs is measured by `benchmarks/kv_quantization.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import CacheConfig, kv_row_bytes
from engine.core import EngineCore
from engine.exec.kv_store import KVStore
from engine.model.checkpoint import inspect
from engine.types import SamplingParams
from tests.helpers.checkpoints import TinyConfig, make_checkpoint, reference_generate
from tests.helpers.engines import Stream, make_core, run

NUM_TOKENS = 64
LONG = [(7 * i + 3) % 90 + 5 for i in range(45)]
SHORT = [5, 17, 3]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
FAMILIES = [
    TinyConfig("llama", {"head_dim": 32}),
    TinyConfig("qwen3", {}),
    TinyConfig("gemma2", {}),
    TinyConfig("mistral", {"sliding_window": 16, "head_dim": 8}, "window"),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda config: config.id)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = request.param
    return make_checkpoint(tmp_path_factory.mktemp("model"), config.family, **config.overrides)


def core_of(path: Path, **limits: object) -> EngineCore:
    return make_core(path, kv_dtype="int8", **limits)  # type: ignore[arg-type]


def alone(path: Path, prompt: list[int]) -> Stream:
    return run(core_of(path), [("alone", prompt, GREEDY)])["alone", 0]


def assert_same(got: Stream, want: Stream) -> None:
    assert got.token_ids == want.token_ids
    logprobs = [entry.logprob for entry in want.logprobs]
    # A last bit of a score can tip the rounding of a key in the next layer.
    assert [entry.logprob for entry in got.logprobs] == pytest.approx(logprobs, abs=0.02)


def test_a_prefix_hit_changes_no_token(path: Path) -> None:
    core, want = core_of(path), alone(path, LONG)
    first = run(core, [("first", LONG, GREEDY)])["first", 0]
    second = run(core, [("second", LONG, GREEDY)])["second", 0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)
    assert_same(first, want)
    assert_same(second, want)


def test_chunks_and_neighbours_change_no_token(path: Path) -> None:
    core = core_of(path, max_num_batched_tokens=7, max_num_seqs=3)
    streams = run(core, [("long", LONG, GREEDY), ("short", SHORT, GREEDY)])
    assert_same(streams["long", 0], alone(path, LONG))
    assert_same(streams["short", 0], alone(path, SHORT))


def test_preemption_changes_no_token(path: Path) -> None:
    core, want = core_of(path, num_blocks=11, prefix_caching=False), alone(path, LONG)
    streams = run(core, [(f"r{i}", LONG, GREEDY) for i in range(2)])
    assert core.snapshot().preemptions > 0
    for i in range(2):
        assert_same(streams[f"r{i}", 0], want)


def test_four_choices_copy_their_last_block_with_its_factors(path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0, n=4)
    streams, want = run(core_of(path), [("n4", LONG, params)]), alone(path, LONG)
    for index in range(4):
        assert_same(streams["n4", index], want)


def test_the_first_tokens_are_those_of_the_whole_model(path: Path) -> None:
    """64 tokens may part at some near tie; the first come from logits that are nearly the same."""
    token_ids, logprobs = reference_generate(path, LONG, NUM_TOKENS)
    got = alone(path, LONG)
    assert got.token_ids[0] == token_ids[0]
    assert got.logprobs[0].logprob == pytest.approx(logprobs[0], abs=0.2)


def test_the_pool_takes_the_bytes_that_the_plan_says(path: Path) -> None:
    checkpoint = inspect(str(path))
    spec = checkpoint.spec
    planned = 2 * spec.num_layers * spec.num_kv_heads * kv_row_bytes(spec.head_dim, "int8") * 16
    store = KVStore(
        CacheConfig(16, 8, planned, True, "int8"),
        num_layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        device=torch.device("cpu"),
    )
    assert sum(layer.nbytes for layer in store.layers) == 8 * planned
