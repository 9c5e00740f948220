"""Loading: where each number ends up, in which type, and what is said on the way."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import ModelError
from engine.model.arch import RopeSpec
from engine.model.checkpoint import inspect
from engine.model.loader import load
from engine.model.rotary import build_cos_sin, inverse_frequencies
from kernels.types import PackedLinear
from tests.helpers.raw_checkpoints import LLAMA, weight_shapes

EMPTY = PackedLinear("plain", torch.empty(0), None, 0, 0)


def write(folder: Path, **config: object) -> dict[str, torch.Tensor]:
    full = {**LLAMA, **config}
    (folder / "config.json").write_text(json.dumps(full))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in weight_shapes(full).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_parts_are_joined_and_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write(tmp_path, attention_bias=True)
    packed: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    monkeypatch.setattr("kernels.api.pack_linear", lambda w, b, _: packed.append((w, b)) or EMPTY)
    model = load(inspect(str(tmp_path)), dtype="float32", device="cpu", max_model_len=16)

    own = "model.layers.0.self_attn."
    weight, bias = packed[0]
    assert weight.dtype == torch.float32
    assert weight.equal(torch.cat([tensors[f"{own}{p}_proj.weight"].float() for p in "qkv"]))
    assert bias is not None
    assert bias.equal(torch.cat([tensors[f"{own}{p}_proj.bias"].float() for p in "qkv"]))
    gate_up = [tensors[f"model.layers.0.mlp.{p}_proj.weight"].float() for p in ("gate", "up")]
    assert packed[2][0].equal(torch.cat(gate_up))
    assert packed[2][1] is None
    assert model.embed_VE.equal(tensors["model.embed_tokens.weight"].float())
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")


def test_weights_outlive_their_file(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    model = load(inspect(str(tmp_path)), dtype="bfloat16", device="cpu", max_model_len=16)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert model.embed_VE.equal(tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packing_a_tied_head_leaves_the_embedding_as_it_is(tmp_path: Path, dtype: str) -> None:
    tensors = write(tmp_path, tie_word_embeddings=True)
    model = load(inspect(str(tmp_path)), dtype=dtype, device="cpu", max_model_len=16)
    assert model.embed_VE.equal(tensors["model.embed_tokens.weight"].to(model.dtype))


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    write(tmp_path)
    checkpoint = inspect(str(tmp_path))
    seen: list[tuple[int, int]] = []
    load(checkpoint, dtype="float32", device="cpu", max_model_len=16, progress=lambda *x: seen.append(x))
    assert seen == sorted(seen)
    assert len(seen) == len(checkpoint.slots)
    assert seen[-1] == (checkpoint.weight_bytes("float32"),) * 2


def test_unused_tensors_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = write(tmp_path)
    save_file({**tensors, "extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load(inspect(str(tmp_path)), dtype="float32", device="cpu", max_model_len=16)
    assert "extra.weight" in caplog.text


def test_a_file_that_changed_since_the_inspection(tmp_path: Path) -> None:
    write(tmp_path)
    checkpoint = inspect(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(ModelError, match=r"model\.safetensors changed or broke"):
        load(checkpoint, dtype="float32", device="cpu", max_model_len=16)


def test_longrope_is_settled_by_the_longest_context() -> None:
    rope = RopeSpec(
        10_000.0, 4, "longrope", original_max_positions=64, short_factors=(1.0, 1.0), long_factors=(2.0, 4.0)
    )
    short, long = inverse_frequencies(rope, 64), inverse_frequencies(rope, 65)
    assert short.tolist() == pytest.approx([1.0, 0.01])
    assert long.tolist() == pytest.approx([0.5, 0.0025])


def test_table_layout() -> None:
    table = build_cos_sin(RopeSpec(10_000.0, 4, "yarn", 1.0, 64, attention_factor=3.0), 5, "cpu")
    assert table.shape == (5, 4)
    assert table.dtype == torch.float32
    assert table[0].tolist() == [3.0, 3.0, 0.0, 0.0]
    angle = torch.tensor([2.0, 0.02])
    assert table[2].tolist() == pytest.approx([*(3 * angle.cos()).tolist(), *(3 * angle.sin()).tolist()])


def test_a_packed_weight_can_be_freed_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []

    def pack(weight: torch.Tensor, *_: object) -> PackedLinear:
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(weight))
        return EMPTY

    monkeypatch.setattr("kernels.api.pack_linear", pack)
    load(inspect(str(tmp_path)), dtype="float32", device="cpu", max_model_len=16)
    assert len(alive) == 9
