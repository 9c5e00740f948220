"""The decoder alone against `transformers`: the same greedy tokens and log probabilities, for every family.

KV memory and page tables are laid out by hand, so nothing of the engine but the model is involved.

    pytest tests/integration/test_model_parity.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.model.checkpoint import inspect
from engine.model.hf_config import HFConfig, read_rope
from engine.model.loader import load
from engine.model.rotary import inverse_frequencies
from engine.model.transformer import Transformer
from kernels import api
from tests.helpers.checkpoints import (
    ALL_CONFIGS,
    TinyConfig,
    make_checkpoint,
    reference_generate,
    reference_logits,
    transformers,
)
from tests.helpers.sequences import Sequences
from tests.helpers.steps import Memory, Part

ROPE_INIT_FUNCTIONS = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
LlamaConfig, Qwen3Config = transformers.LlamaConfig, transformers.Qwen3Config

PROMPT = [(7 * i + 3) % 90 + 5 for i in range(45)]
NUM_TOKENS = 64
MAX_MODEL_LEN = 256


@pytest.fixture(scope="module", autouse=True)
def single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=ALL_CONFIGS, ids=lambda config: config.id)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: TinyConfig = request.param
    return make_checkpoint(tmp_path_factory.mktemp("model"), config.family, **config.overrides)


def load_model(path: Path, dtype: str = "float32") -> Transformer:
    return load(inspect(str(path)), dtype=dtype, device="cpu", max_model_len=MAX_MODEL_LEN)


@pytest.mark.parametrize("chunk", [len(PROMPT), 7], ids=["in-one-go", "chunks-of-7"])
def test_greedy_tokens_and_logprobs(path: Path, chunk: int) -> None:
    sequence = Sequences(load_model(path))
    for start in range(0, len(PROMPT), chunk):
        logits = sequence.logits(PROMPT[start : start + chunk], start)
    token_ids: list[int] = []
    logprobs: list[float] = []
    while True:
        logprob, token_id = logits[-1].log_softmax(-1).max(-1)
        token_ids.append(int(token_id))
        logprobs.append(float(logprob))
        if len(token_ids) == NUM_TOKENS:
            break
        logits = sequence.logits(token_ids[-1:], len(PROMPT) + len(token_ids) - 1)

    expected_ids, expected_logprobs = reference_generate(path, PROMPT, NUM_TOKENS)
    assert token_ids == expected_ids
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def test_logits_of_a_whole_prompt(path: Path) -> None:
    logits = Sequences(load_model(path)).logits(PROMPT, 0)
    assert logits.dtype == torch.float32
    expected = reference_logits(path, PROMPT).log_softmax(-1)
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=2e-4, rtol=0)


def test_bfloat16_errs_no_more_than_transformers_does(path: Path) -> None:
    exact = reference_logits(path, PROMPT).log_softmax(-1)
    theirs = reference_logits(path, PROMPT, torch.bfloat16).log_softmax(-1)
    ours = Sequences(load_model(path, "bfloat16")).logits(PROMPT, 0).log_softmax(-1)
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


@pytest.mark.skipif(not api.is_native(), reason="the native library is not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_layers_in_one_call_are_the_layers_one_by_one(path: Path, dtype: str) -> None:
    model = load_model(path, dtype)
    assert model.native is not None
    at_once = Sequences(model)
    expected = [at_once.logits(PROMPT, 0), at_once.logits([17], len(PROMPT))]
    model.native = None
    one_by_one = Sequences(model)
    for logits, (token_ids, start) in zip(expected, ((PROMPT, 0), ([17], len(PROMPT))), strict=True):
        assert torch.equal(logits, one_by_one.logits(token_ids, start))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["one-call", "one-by-one"])
def test_the_last_layer_of_wanted_tokens_alone(path: Path, dtype: str, one_by_one: bool) -> None:
    model = load_model(path, dtype)
    if one_by_one:
        model.native = None
    whole, wanted = Memory(model), Memory(model)
    chunk: list[Part] = [(0, 0, PROMPT[:7]), (1, 0, PROMPT[7:40]), (2, 0, PROMPT[:2])]
    ends = torch.stack([logits[-1] for logits in whole.logits(*chunk)])
    assert torch.equal(wanted.last_logits(*chunk, of=[0, 2]), ends[[0, 2]])
    # A step of which nobody wants anything yet leaves keys and values, as any other does.
    middle: Part = (0, 7, PROMPT[7:40])
    whole.logits(middle)
    assert wanted.last_logits(middle, of=[]).shape == (0, model.spec.vocab_size)
    last: Part = (0, 40, PROMPT[40:])
    assert torch.equal(wanted.last_logits(last, of=[0])[0], whole.logits(last)[0][-1])


# Rotary parameters as published, at full size, where a tiny model would not show a wrong frequency.
PUBLISHED = {
    "llama-3.1": (
        LlamaConfig,
        {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen3-yarn": (
        Qwen3Config,
        {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32_768,
        },
    ),
    "dynamic": (LlamaConfig, {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}),
    "linear": (LlamaConfig, {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("max_model_len", [4096, 131_072])
def test_rotary_frequencies_of_published_models(name: str, max_model_len: int) -> None:
    config_class, parameters = PUBLISHED[name]
    theirs = config_class(
        hidden_size=4096, num_attention_heads=32, head_dim=128, max_position_embeddings=40_960,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    expected, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, seq_len=max_model_len)
    rope = read_rope(HFConfig(theirs.to_dict()), 128)
    assert rope.attention_factor == attention_factor
    torch.testing.assert_close(inverse_frequencies(rope, max_model_len), expected, rtol=1e-6, atol=0)
