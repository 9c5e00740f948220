"""GGUF files against the weights that they stand for, in fp32 and safetensors: the same decoder.

pytest tests/integration/test_gguf_parity.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.build import build
from engine.config import EngineOptions
from engine.llm import LLM
from engine.model.checkpoint import inspect
from engine.model.loader import load
from engine.model.rotary import inverse_frequencies
from engine.model.transformer import Transformer
from engine.types import SamplingParams
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.gguf import Kinds, by_size, write_floats, write_gguf
from tests.helpers.sequences import Sequences

PROMPT = [(7 * i + 3) % 90 + 5 for i in range(45)]
NUM_TOKENS = 32
BIASES = {"attention_bias": True, "mlp_bias": True}
WIDE = {"hidden_size": 256, "num_attention_heads": 8}  # so that a row is one block of Q6_K
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }
}  # fmt: skip
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    }
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any], Kinds, dict[str, Any]]] = {
    "llama-f32": ("llama", {}, by_size("F32"), {}),
    "llama-f16": ("llama", {}, by_size("F16"), {}),
    "llama-bf16": ("llama", {}, by_size("BF16"), {}),
    "llama-q8": ("llama", {}, by_size("Q8_0"), {}),
    "llama-q4": ("llama", {}, by_size("Q4_0"), {}),
    "llama-biases": ("llama", BIASES, by_size("Q8_0"), {}),
    "llama-tied-q8": ("llama", {"tie_word_embeddings": True}, by_size("Q8_0"), {}),
    "llama-tied-f16": ("llama", {"tie_word_embeddings": True}, by_size("F16"), {}),
    "qwen2-q8": ("qwen2", {}, by_size("Q8_0"), {}),
    "qwen3-q4": ("qwen3", {}, by_size("Q4_0"), {}),
    "qwen3-mixed": (
        "qwen3", {}, by_size("Q4_0", blk_0_attn_q_weight="Q8_0", blk_1_ffn_down_weight="Q4_1"), {},
    ),
    "qwen3-q6-output": ("qwen3", WIDE, by_size("Q4_0", output_weight="Q6_K"), {}),
    "qwen3-tied-q6": (
        "qwen3", {**WIDE, "tie_word_embeddings": True}, by_size("Q4_0", token_embd_weight="Q6_K"), {},
    ),
    "qwen3-yarn": (
        "qwen3", YARN, by_size("Q8_0"),
        {
            "qwen3__rope__scaling__type": "yarn", "qwen3__rope__scaling__factor": 4.0,
            "qwen3__rope__scaling__original_context_length": 64,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file, and the weights in it as a checkpoint."""
    family, overrides, kinds, metadata = CASES[request.param]
    folder = tmp_path_factory.mktemp("gguf")
    source = make_checkpoint(folder, family, **overrides)
    floats = write_gguf(source, folder / "model.gguf", kinds, **metadata)
    return folder / "model.gguf", write_floats(source, folder / "floats", floats)


def load_model(path: Path) -> Transformer:
    return load(inspect(str(path)), dtype="float32", device="cpu", max_model_len=256)


def logprobs(model: Transformer, tokens: list[int]) -> Tensor:
    return Sequences(model).logits(PROMPT + tokens, 0).log_softmax(-1)


def test_a_file_is_the_weights_it_stands_for(pair: tuple[Path, Path]) -> None:
    file, folder = pair
    ours, theirs = load_model(file), load_model(folder)
    tokens = Sequences(theirs).greedy(PROMPT, NUM_TOKENS)
    assert len(set(tokens)) > 1, "a model that repeats itself would hide mistakes"
    # Sums in another order differ; a row or a bit in a wrong place errs by whole units.
    torch.testing.assert_close(logprobs(ours, tokens), logprobs(theirs, tokens), atol=2e-2, rtol=0)


def test_rotary_factors_of_llama_3(tmp_path: Path) -> None:
    """llama.cpp's converter writes what the scaling does to each pair of dims, as a tensor."""
    source = make_checkpoint(tmp_path, "llama", **LLAMA3)
    plain = inspect(str(make_checkpoint(tmp_path, "llama")))
    scaled, unscaled = (
        inverse_frequencies(checkpoint.spec.ropes[0], 256) for checkpoint in (inspect(str(source)), plain)
    )
    floats = write_gguf(
        source, tmp_path / "model.gguf", by_size("F32"), extra={"rope_freqs.weight": unscaled / scaled}
    )
    ours = load_model(tmp_path / "model.gguf")
    theirs = load_model(write_floats(source, tmp_path / "floats", floats))
    tokens = Sequences(theirs).greedy(PROMPT, NUM_TOKENS)
    torch.testing.assert_close(logprobs(ours, tokens), logprobs(theirs, tokens), atol=1e-3, rtol=0)
    rope = inspect(str(tmp_path / "model.gguf")).spec.ropes[0]
    torch.testing.assert_close(inverse_frequencies(rope, 256), scaled)


@pytest.mark.parametrize("kind, bits", [("Q8_0", 8), ("Q4_0", 4)])
def test_integers_stay_integers(tmp_path: Path, kind: str, bits: int) -> None:
    source = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    write_gguf(source, tmp_path / "model.gguf", by_size(kind))
    model = load_model(tmp_path / "model.gguf")
    held = [getattr(layer.weights, name).bits for layer in model.layers for name in ("qkv", "o")]
    assert held == [bits] * len(held)
    # Tied in the file, where it is in integers: multiplied so, and looked up in floats.
    assert "lm_head.weight" in inspect(str(tmp_path / "model.gguf")).stored


def test_the_plan_and_the_report(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path, "qwen3")
    write_gguf(source, tmp_path / "tiny.gguf", by_size("Q8_0"))
    core, info = build(EngineOptions(model=str(tmp_path / "tiny.gguf"), dtype="float32", device="cpu"))
    assert core is not None
    assert info.quantization == "GGUF Q8_0 int8"
    assert info.model == "tiny"
    assert info.weight_bytes < inspect(str(source)).weight_bytes("float32")


def test_offline_from_a_folder_with_one_file(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path, "llama")
    folder = tmp_path / "downloaded"
    folder.mkdir()
    write_floats(source, tmp_path / "floats", write_gguf(source, folder / "model.gguf", by_size("F32")))
    params = SamplingParams(temperature=0.0, max_tokens=8)
    texts = [
        LLM(str(path), dtype="float32", device="cpu").chat([{"role": "user", "content": "hi"}], params)
        for path in (folder, tmp_path / "floats")
    ]
    assert texts[0].choices[0].token_ids == texts[1].choices[0].token_ids
    assert texts[0].prompt_ids == texts[1].prompt_ids
