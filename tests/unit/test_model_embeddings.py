"""What the files beside a model say of its embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.embedding import EmbeddingFacts, PoolingKind
from engine.model.checkpoint import inspect
from engine.model.embeddings import read_embedding_facts
from tests.helpers.checkpoints import make_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(make_checkpoint(tmp_path / "made", "llama"), tmp_path / "model")


def facts(folder: Path) -> EmbeddingFacts:
    return read_embedding_facts(inspect(str(folder)))


def write(folder: Path, name: str, value: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_model_that_says_nothing_pools_the_last_token(folder: Path) -> None:
    assert facts(folder) == EmbeddingFacts(64, PoolingKind.LAST)


FLAGS = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({**FLAGS, "pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({**FLAGS, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}, "mean"),
        ({**FLAGS, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling(folder: Path, config: dict[str, Any], kind: str) -> None:
    write(folder, "1_Pooling/config.json", config)
    modules = [{"idx": i, "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(THREE)]
    write(folder, "modules.json", modules)
    assert facts(folder) == EmbeddingFacts(64, PoolingKind(kind))


THREE = ("Transformer", "Pooling", "Normalize")


@pytest.mark.parametrize(
    ("file", "value", "says"),
    [
        ("1_Pooling/config.json", {**FLAGS, "pooling_mode_max_tokens": True}, "asks for max_tokens;"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "asks for weightedmean;"),
        ("1_Pooling/config.json", {**FLAGS}, "no pooling"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "mean_tokens, cls_token",
        ),
        ("1_Pooling/config.json", [], "1_Pooling/config.json is not a JSON object"),
        ("1_Pooling/config.json", "{", "1_Pooling/config.json is not valid JSON"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "asks for Dense"),
        ("modules.json", {"a": 1}, "not a list of modules"),
        ("modules.json", [3], "not a list of modules"),
    ],
)
def test_what_cannot_be_done_is_said_and_text_is_served_all_the_same(
    folder: Path, file: str, value: Any, says: str
) -> None:
    write(folder, file, value)
    found = facts(folder)
    assert says in found.refusal and not found.only


@pytest.mark.parametrize("change", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_a_model_that_looks_ahead_gives_none(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", {**config, **change})
    assert "see no later ones" in facts(folder).refusal


def test_a_missing_output_layer_is_an_error_where_the_rest_of_the_model_is_there(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    from engine.errors import ModelError

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        inspect(str(folder))
