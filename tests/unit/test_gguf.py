"""GGUF files: what is refused before anything is allocated, and which file a name means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.build import model_facts
from engine.errors import ModelError
from engine.gguf.container import BLOCKS, read_gguf
from engine.model.checkpoint import inspect
from engine.model.gguf import blocks
from engine.model.gguf.tensors import GGUFTensors
from engine.model.loader import load
from engine.model.quant.unpack import unpack
from kernels import api
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.gguf import ENCODERS, by_size, encode, write_gguf, write_raw


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        inspect(str(path))
    return str(caught.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def file(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, valid, and not to be changed."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(source, path, by_size("Q8_0", output_weight="F16"))
    return path


@pytest.mark.parametrize("kind", ENCODERS)
def test_blocks_are_what_they_stand_for(kind: str) -> None:
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    raw, floats = encode(weight, kind)
    blocks_Kn = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, BLOCKS[kind].num_bytes)
    torch.testing.assert_close(blocks.floats(blocks_Kn, kind).view(6, 512), floats, rtol=1e-6, atol=1e-7)
    # The encoder itself is not far off, so that the two do not merely share a mistake.
    assert (floats - weight).norm() / weight.norm() < 0.12


@pytest.mark.parametrize("kind, bits", [("Q8_0", 8), ("Q4_0", 4)])
def test_the_integers_are_those_of_the_file(source: Path, tmp_path: Path, kind: str, bits: int) -> None:
    path = tmp_path / "model.gguf"
    floats = write_gguf(source, path, by_size(kind))
    checkpoint = inspect(str(path))
    reader = GGUFTensors(path, checkpoint.tensors)
    for name, stored in checkpoint.stored.items():
        weight = unpack(stored, reader.get_tensor)
        assert isinstance(weight, api.QuantizedWeight)
        assert weight.bits == bits
        assert torch.equal(api.dequantize(weight, torch.float32), floats[name])
    linears = [part.name for slot in checkpoint.slots if slot.linear for part in slot.parts]
    assert sorted(checkpoint.stored) == sorted(linears)


def test_what_is_known_beforehand(file: Path) -> None:
    checkpoint = inspect(str(file))
    assert checkpoint.format == "GGUF Q8_0"
    assert checkpoint.unused == ()
    assert checkpoint.eos_token_ids == (2,)
    assert checkpoint.path == file
    assert "lm_head.weight" not in checkpoint.stored  # it is in F16


@pytest.mark.parametrize(
    "kind, dtype", [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32"), ("Q8_0", "")]
)
def test_what_it_says_of_the_compute_dtype(source: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    """Norms are always fp32 and scales always fp16, whatever the model was trained in."""
    write_gguf(source, tmp_path / "model.gguf", by_size(kind))
    facts = model_facts(inspect(str(tmp_path / "model.gguf")), torch.device("cpu"))
    assert facts.checkpoint_dtype == dtype
    assert facts.name == "model"


def test_tensors_that_nothing_reads_are_named(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(source, path, by_size("F32"), extra={"blk.0.mystery.weight": torch.ones(4)})
    assert inspect(str(path)).unused == ("blk.0.mystery.weight",)


def test_a_type_that_cannot_be_read(tmp_path: Path) -> None:
    tensors = {
        "token_embd.weight": ("F32", (4, 32), bytes(512)),
        "blk.0.attn_q.weight": ("Q4_K", (1, 256), bytes(144)),
    }
    message = refusal(write_raw(tmp_path / "model.gguf", {"general.architecture": "llama"}, tensors))
    assert message.startswith("model.gguf: tensor blk.0.attn_q.weight is Q4_K, which cannot be read")
    assert "Take the model's Q8_0 or Q4_0 file" in message


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"general__architecture": "gemma3"}, "architecture 'gemma3' is not served from GGUF; llama, qwen2"),
        ({"general__architecture": None}, "architecture None is not served"),
        ({"general__architecture": ["llama"]}, "general.architecture is not of type str"),
        ({"llama__block_count": None}, "llama.block_count is missing"),
        ({"llama__block_count": 9}, "weights are missing"),
        ({"llama__block_count": -1.0}, "num_hidden_layers must be an integer"),
        ({"llama__attention__head_count": [4, 4, 4]}, "llama.attention.head_count is not of type int"),
        ({"llama__expert_count": 8}, "mixtures of experts are not served"),
        ({"llama__rope__dimension_count": 8}, "rotary embeddings of a part of each head"),
        ({"llama__rope__scaling__type": "longrope"}, "rope scaling by type 'longrope' is not served"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.factor is missing"),
        ({"llama__rope__scaling__attn_factor": 1.2}, "rope scaling by attn_factor is not served"),
        ({"llama__rope__scale_linear": 2.0}, "rope scaling by linear is not served"),
        ({"split__count": 3}, "model.gguf is one of 3 parts. Join them first: llama-gguf-split --merge"),
        ({"general__alignment": 12}, "cut short or is not a GGUF file"),
        ({"general__alignment": "x"}, "cut short or is not a GGUF file"),
    ],
)
def test_metadata_that_is_refused(source: Path, tmp_path: Path, metadata: dict[str, Any], words: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(source, path, by_size("F32"), **metadata)
    message = refusal(path)
    assert words in message
    assert "\n" not in message


def without_embedding(path: Path) -> None:
    write_raw(path, {"general.architecture": "llama"}, {"x": ("F32", (8,), bytes(32))})


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "cut short"),
    "magic": (lambda path: path.write_bytes(b"GGML" + path.read_bytes()[4:]), "is not a GGUF file"),
    "version": (lambda path: path.write_bytes(b"GGUF\x01" + path.read_bytes()[5:]), "is GGUF version 1"),
    "header": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "cut short"),
    "data": (lambda path: path.write_bytes(path.read_bytes()[:-64]), "cut short"),
    "no embedding": (without_embedding, "token_embd.weight is missing"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_files(file: Path, tmp_path: Path, name: str) -> None:
    damage, words = BREAKS[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(file.read_bytes())
    damage(path)
    message = refusal(path)
    assert words in message
    assert "model.gguf" in message


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_bytes_of_any_value_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    tensors = {"token_embd.weight": ("F32", (4, 8), bytes(128))}
    metadata = {"general.architecture": "llama", "a.list": ["x", "y"], "numbers": [1, 2], "f": 1.0}
    raw = bytearray(write_raw(path, metadata, tensors).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        found = read_gguf(path)
    except ModelError:
        return
    assert all(entry.end <= len(raw) for entry in found.tensors.values())


def test_a_file_that_breaks_after_it_was_inspected(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file.read_bytes())
    checkpoint = inspect(str(path))
    path.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="changed or broke while it was read"):
        load(checkpoint, dtype="float32", device="cpu", max_model_len=64)


def test_which_file_a_folder_means(file: Path, tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(file.read_bytes())
    assert inspect(str(tmp_path)).path == tmp_path / "one.gguf"
    (tmp_path / "two.gguf").write_bytes(file.read_bytes())
    assert "holds 2 GGUF files; name the one to serve: one.gguf, two.gguf" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "config.json cannot be read" in refusal(tmp_path)  # safetensors are preferred
    assert "no such folder" in refusal(tmp_path / "three.gguf")
