"""Inspection: what is refused, before anything is allocated, and in which words."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import hub
from engine.errors import ModelError
from engine.model.checkpoint import INDEX, inspect
from tests.helpers.raw_checkpoints import LLAMA, weight_shapes, write_checkpoint, write_tensors


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        inspect(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_shards(folder: Path, count: int = 3) -> dict[str, str]:
    write_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    shapes = list(weight_shapes(LLAMA).items())
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        write_tensors(folder / file, dict(shapes[i::count]))
        weight_map.update({name: file for name, _ in shapes[i::count]})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_a_good_checkpoint(tmp_path: Path) -> None:
    checkpoint = inspect(str(write_checkpoint(tmp_path)))
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.eos_token_ids == (2,)
    assert checkpoint.unused == ()
    stored_bytes = 2 * sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert checkpoint.weight_bytes("bfloat16") == stored_bytes
    assert checkpoint.weight_bytes("float32") == 2 * checkpoint.weight_bytes("bfloat16")
    assert [slot.name for slot in checkpoint.slots][:3] == ["embed", "layers.0.input_norm", "layers.0.qkv"]


def test_inspection_does_not_import_torch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    code = "import sys; from engine.model.checkpoint import inspect; inspect(sys.argv[1]); "
    code += "print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_shards(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    checkpoint = inspect(str(tmp_path))
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == weight_map


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/x.safetensors", "model.bin", 5, None])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: Any) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    assert "weight_map" in refusal(tmp_path)


def test_the_same_tensor_in_two_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    write_tensors(tmp_path / "b.safetensors", {"model.norm.weight": (8,)})
    assert "in both a.safetensors and b.safetensors" in refusal(tmp_path)


def test_the_other_copy_of_mistral_weights_is_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert {tensor.file for tensor in inspect(str(tmp_path)).tensors.values()} == {"weights.safetensors"}


def test_missing_weights_are_named(tmp_path: Path) -> None:
    shapes = weight_shapes(LLAMA)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    message = refusal(write_checkpoint(tmp_path, weights=shapes))
    assert "1 of 21 weights are missing: model.layers.1.mlp.up_proj.weight" in message


def test_wrong_shape(tmp_path: Path) -> None:
    shapes = {**weight_shapes(LLAMA), "model.embed_tokens.weight": (15, 8)}
    message = refusal(write_checkpoint(tmp_path, weights=shapes))
    assert "model.embed_tokens.weight has shape [15, 8]" in message
    assert "[16, 8]" in message


def test_integer_weights(tmp_path: Path) -> None:
    assert "stored as I8" in refusal(write_checkpoint(tmp_path, dtype="I8"))


def test_unused_tensors_are_told_apart_from_harmless_ones(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (2,),
        "model.layers.2.mlp.up_proj.weight": (12, 8),
    }
    write_checkpoint(tmp_path, weights={**weight_shapes(LLAMA), **extra})
    assert inspect(str(tmp_path)).unused == ("model.layers.2.mlp.up_proj.weight",)


def test_a_tied_head_that_is_in_the_file_all_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, weights=weight_shapes(LLAMA), tie_word_embeddings=True)
    checkpoint = inspect(str(tmp_path))
    assert checkpoint.unused == ()
    assert "lm_head" not in [slot.name for slot in checkpoint.slots]


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_gemma_3_under_each_of_its_prefixes(tmp_path: Path, prefix: str) -> None:
    text = {k: v for k, v in LLAMA.items() if k not in ("architectures", "eos_token_id")} | {"head_dim": 4}
    plain = {"architectures": ["Gemma3ForCausalLM"], **text}
    shapes = {name.replace("model.", prefix, 1): shape for name, shape in weight_shapes(plain).items()}
    shapes |= {"vision_tower.vision_model.head.weight": (4,), "multi_modal_projector.weight": (4,)}
    write_checkpoint(
        tmp_path,
        weights=shapes,
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=text,
        eos_token_id=[1, 6],
    )
    checkpoint = inspect(str(tmp_path))
    assert checkpoint.unused == ()
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.eos_token_ids == (1, 6)


def test_generation_config_decides_the_end_of_turn(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 2, 3, 99, -1, true]}')
    checkpoint = inspect(str(tmp_path))
    assert checkpoint.eos_token_ids == (3, 2)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_broken_config(tmp_path: Path, text: bytes) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    assert "config.json" in refusal(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    assert "config.json cannot be read" in refusal(tmp_path)


def test_no_architectures(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert "none named" in refusal(_rewrite(tmp_path, architectures=None))
    assert "must be a list" in refusal(_rewrite(tmp_path, architectures=[["x"]]))


def _rewrite(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def test_remote_code_is_ignored_where_it_is_not_needed(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    inspect(str(write_checkpoint(tmp_path, auto_map=auto_map)))
    message = refusal(_rewrite(tmp_path, auto_map=auto_map, architectures=["MyModel"]))
    assert "never executed" in message
    assert "LlamaForCausalLM" in message


@pytest.mark.parametrize(
    ("file", "word"),
    [("pytorch_model.bin", "pickled"), ("notes.txt", "No *.safetensors")],
)
def test_no_safetensors(tmp_path: Path, file: str, word: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    assert word in refusal(tmp_path)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "not a GGUF file" in refusal(tmp_path / "weights.gguf")
    assert "is a file" in refusal(tmp_path / "model.safetensors")
    assert "no such folder" in refusal(tmp_path / "nothing")
    for name in ("", "\0", "~nobody/x/y", "x" * 5000 + "/"):
        assert "no such folder" in refusal(name)


def test_hub_downloads_the_config_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def fake(repository: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    write_checkpoint(tmp_path, architectures=["LlamaForCausalLM"])
    assert inspect("someone/model@v1").path == tmp_path
    assert [(r, v) for r, v, _ in asked] == [("someone/model", "v1")] * 2
    assert ["*.safetensors" in patterns for _, _, patterns in asked] == [False, True]
    assert not any("bin" in pattern or ".py" in pattern for _, _, patterns in asked for pattern in patterns)

    asked.clear()
    _rewrite(tmp_path, architectures=["Other"])
    refusal("someone/model")
    assert len(asked) == 1


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: Any, **__: Any) -> str:
        raise OSError("offline\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert "could not be had from the hub (OSError: offline)" in refusal("someone/model")
    assert hub.HUB_ID.fullmatch("gpt2")
    assert not hub.HUB_ID.fullmatch("a/b/c")
