"""Quantised weights against the same weights in fp32: one decoder, the same tokens, every format.

pytest tests/integration/test_quantized_parity.py
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.build import build
from engine.config import EngineOptions, Quantization
from engine.errors import ConfigError
from engine.llm import LLM
from engine.model.checkpoint import inspect
from engine.model.loader import load
from engine.model.transformer import Transformer
from engine.types import SamplingParams
from kernels import api
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.quantized import LINEAR, WRITERS, write_dequantized, write_quantized
from tests.helpers.raw_checkpoints import write_checkpoint
from tests.helpers.sequences import Sequences

PROMPT = [(7 * i + 3) % 90 + 5 for i in range(45)]
NUM_TOKENS = 32
FAMILIES = ("llama", "qwen3", "gemma3")


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def load_model(path: Path, **options: Any) -> Transformer:
    options = {"dtype": "float32", **options}
    return load(inspect(str(path)), device="cpu", max_model_len=256, **options)


def assert_alike(got: Transformer, expected: Transformer) -> None:
    """The same log probabilities and choices after the prompt and along what the reference says next.

    Sums in another order differ, and the native library rounds inputs to 15 bits of the largest; a wrong
    order of bits errs by whole units.
    """
    tokens = Sequences(expected).greedy(PROMPT, NUM_TOKENS)
    assert len(set(tokens)) > 1, "a model that repeats itself would hide mistakes"
    ours, theirs = (Sequences(m).logits(PROMPT + tokens, 0).log_softmax(-1) for m in (got, expected))
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)
    best, second = theirs.topk(2).values.unbind(-1)
    clear = best - second > 5e-2
    assert clear.sum() > NUM_TOKENS
    assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


@pytest.mark.parametrize("name", WRITERS)
def test_a_quantised_checkpoint_is_its_dequantised_self(source: Path, name: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    quantized = load_model(write_quantized(source, tmp_path / "quantized", writer))
    assert_alike(quantized, load_model(write_dequantized(source, tmp_path / "floats", writer)))
    # The weights are really held in integers, but for parts that were left alone.
    held = [layer.weights.o.bits for layer in quantized.layers]
    assert held == [writer.bits] * len(held)
    mixed = quantized.layers[0].weights.qkv.bits
    assert mixed == (0 if writer.left_alone else writer.bits)


@pytest.mark.parametrize("text", ["int8", "int8-g32", "int4"])
def test_rounding_on_the_fly_is_its_dequantised_self(source: Path, text: str, tmp_path: Path) -> None:
    asked = Quantization.parse(text)
    expected = load_model(_rounded(source, tmp_path / "floats", asked))
    assert_alike(load_model(source, quantization=asked), expected)


def _rounded(source: Path, target: Path, asked: Quantization) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name, weight in tensors.items():
        head = "lm_head" in name
        if head or LINEAR.search(name):
            bits, size = (8, 0) if head else (asked.bits, asked.group_size)
            tensors[name] = api.dequantize(api.quantize(weight, bits, size), torch.float32)
    if "lm_head.weight" not in tensors:  # tied: the look-up is exact, the output layer is not
        embed = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = api.dequantize(api.quantize(tensors[embed], 8, 0), torch.float32)
        config = (target / "config.json").read_text()
        (target / "config.json").write_text(
            config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
        )
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["gptq", "awq", "packed"])
def test_another_order_of_bits_is_found_out(llama: Path, name: str, tmp_path: Path) -> None:
    """The comparison above can fail: nibbles swapped within their byte make another model."""
    writer = WRITERS[name]
    path = write_quantized(llama, tmp_path / "quantized", writer)
    tensors = load_file(path / "model.safetensors")
    key = next(key for key in tensors if key.endswith(("qweight", "weight_packed")))
    bytes_ = tensors[key].view(torch.uint8)
    tensors[key] = ((bytes_ << 4) | (bytes_ >> 4)).view(torch.int32)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    expected = load_model(write_dequantized(llama, tmp_path / "floats", writer))
    with pytest.raises(AssertionError):
        assert_alike(load_model(path), expected)


def test_fp8_is_widened_and_said(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, floats = tmp_path / "fp8", tmp_path / "floats"
    tensors = load_file(llama / "model.safetensors")
    wide = dict(tensors)
    for name in [name for name in tensors if LINEAR.search(name)]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
        wide[name] = tensors[name].float() * scale
    for folder, content in ((path, tensors), (floats, wide)):
        shutil.copytree(llama, folder)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    config = (path / "config.json").read_text()
    method = '{"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}, '
    (path / "config.json").write_text(config.replace("{", method, 1))
    with caplog.at_level(logging.WARNING, "engine.model.loader"):
        model = load_model(path)
    assert "fp8" in caplog.text and "float32" in caplog.text
    assert_alike(model, load_model(floats))


def test_parts_in_different_orders_are_widened(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = WRITERS["gptq-order"]
    monkeypatch.setattr("tests.helpers.quantized._seed", lambda name: sum(map(ord, name)))
    path = write_quantized(llama, tmp_path / "quantized", writer)
    expected = load_model(write_dequantized(llama, tmp_path / "floats", writer))
    with caplog.at_level(logging.WARNING, "engine.model.loader"):
        model = load_model(path)
    assert "not quantised alike" in caplog.text and "layers.0.qkv" in caplog.text
    assert (model.layers[0].weights.qkv.bits, model.layers[0].weights.o.bits) == (0, 4)
    assert_alike(model, expected)


def test_the_flag_rounds_what_the_checkpoint_left_alone(llama: Path, tmp_path: Path) -> None:
    path = write_quantized(llama, tmp_path / "quantized", WRITERS["packed"])
    plain, rounded = load_model(path), load_model(path, quantization=Quantization.parse("int8"))
    assert (plain._lm_head.bits, rounded._lm_head.bits) == (0, 8)
    assert plain.layers[0].weights.down.bits == rounded.layers[0].weights.down.bits == 4


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int4"}], ids=str)
@pytest.mark.parametrize("name", ["", "gptq-v2-asym-order", "packed-mixed", "ints"])
def test_the_memory_plan_counts_what_is_held(
    source: Path, name: str, options: dict[str, str], tmp_path: Path
) -> None:
    path = write_quantized(source, tmp_path / "quantized", WRITERS[name]) if name else source
    core, info = build(
        EngineOptions(model=str(path), dtype="float32", kv_cache_memory_bytes=1 << 20, **options)  # type: ignore[arg-type]
    )
    model = core._executor._model  # type: ignore[attr-defined]
    linears = [model._lm_head]
    for layer in model.layers:
        linears += [layer.weights.qkv, layer.weights.o, layer.weights.gate_up, layer.weights.down]
    held = sum(packed.num_bytes for packed in linears) + model.embed_VE.nbytes
    # Norms are not in the sum; panels are padded in the native library.
    assert held <= info.weight_bytes * 1.1
    assert held >= info.weight_bytes * 0.9


def test_served_whole(llama: Path, tmp_path: Path) -> None:
    """Through the engine and in bf16, as users run it: scheduler, batches, sampler."""
    path = write_quantized(llama, tmp_path / "quantized", WRITERS["awq"])
    llm = LLM(str(path), dtype="bfloat16", kv_cache_memory_bytes=4 << 20)
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert len(output.choices[0].token_ids) == 8
    assert llm.info.quantization == "AWQ int4"


def test_groups_that_do_not_fit_are_smaller_or_refused(llama: Path, tmp_path: Path) -> None:
    model = load_model(llama, quantization=Quantization.parse("int4-g128"))
    weights = model.layers[0].weights
    groups = [packed.scale_OG.shape[1] for packed in (weights.gate_up, weights.down)]
    assert groups == [1, 3]  # 64 inputs in one group, 96 in groups of 32
    path = write_checkpoint(tmp_path / "odd", hidden_size=40)
    with pytest.raises(ConfigError, match=r"int4: layers\.0\.qkv has 40 inputs.*Choose int8"):
        build(EngineOptions(model=str(path), quantization="int4"))
    with pytest.raises(ConfigError, match="expected int8 or int4"):
        build(EngineOptions(model=str(llama), quantization="int3"))
