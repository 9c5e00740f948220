"""docs/api.md says of every parameter what the code does with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.embeddings import EmbeddingRequest
from tests.helpers.parameters import ignored

PAGE = Path(__file__).parents[2] / "docs/api.md"
MODELS: dict[str, Any] = {"chat": ChatRequest, "completions": CompletionRequest}


def told() -> dict[str, dict[str, str]]:
    """API -> parameter -> what the page says of it."""
    rows = re.findall(r"^\| (`.+?`) \| ([\w-]+) \| ([\w-]+) \|", PAGE.read_text(), flags=re.M)
    found: dict[str, dict[str, str]] = {"chat": {}, "completions": {}}
    for names, *fates in rows:
        for name in re.findall(r"`(\w+)`", names):
            for api, fate in zip(found, fates, strict=True):
                assert name not in found[api], f"{name} has two rows"
                found[api][name] = fate
    return found


def told_of_embeddings() -> dict[str, str]:
    section = PAGE.read_text().split("## Embeddings\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| ([\w-]+) \|", section, flags=re.M)
    pairs = [(name, fate) for names, fate in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(dict(pairs)) == len(pairs), "a parameter has two rows"
    return dict(pairs)


def test_every_parameter_of_embeddings_has_its_row() -> None:
    names = {*EmbeddingRequest.model_fields, *EmbeddingRequest.refused}
    assert told_of_embeddings() == {name: done(EmbeddingRequest, name) for name in names}


def done(model: Any, name: str) -> str:
    if name in model.refused or name in model.replaced:
        return "refused"
    if name in ignored(model):
        return "ignored"
    return "yes" if name in model.model_fields else "-"


@pytest.mark.parametrize("api", MODELS)
def test_every_parameter_has_its_row(api: str) -> None:
    model, rows = MODELS[api], told()[api]
    names = {*model.model_fields, *model.refused, *model.replaced}
    assert names - set(rows) == set()
    assert {name: fate for name, fate in rows.items() if fate != done(model, name)} == {}


@pytest.mark.parametrize("api", MODELS)
def test_what_is_ignored_is_not_refused(api: str) -> None:
    model = MODELS[api]
    assert "user" in ignored(model)
    assert not ignored(model) & {*model.refused, *model.replaced}
