"""Which sampling parameters a request ends up with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.text.files import read_text_files, sampling_defaults
from engine.types import SamplingParams
from server.schema.chat import ChatRequest
from server.schema.common import parse, to_sampling_params
from tests.helpers.checkpoints import write_tokenizer

DEFAULTS = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}


def params(**given: object) -> SamplingParams:
    request = parse(ChatRequest, {"messages": [{"role": "user", "content": "hi"}], **given})
    return to_sampling_params(request, DEFAULTS, max_tokens=None, logprobs=None)


def test_the_models_defaults_fill_what_a_request_leaves_out() -> None:
    chosen = params(top_p=0.5)
    assert (chosen.temperature, chosen.top_k, chosen.top_p, chosen.repetition_penalty) == (0.6, 20, 0.5, 1.1)


def test_what_a_request_says_wins_also_where_it_is_the_usual_value() -> None:
    chosen = params(temperature=1.0, top_k=0, repetition_penalty=1.0)
    assert (chosen.temperature, chosen.top_k, chosen.repetition_penalty) == (1.0, 0, 1.0)


def test_null_is_the_default() -> None:
    assert params(temperature=None).temperature == 0.6


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {"temperature": 0.7, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 99, "top_p": 0, "top_k": "x", "min_p": None}, {}),
    ],
)  # fmt: skip
def test_defaults_come_from_generation_config(
    generation: dict[str, object], expected: dict[str, float], tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert sampling_defaults(read_text_files(tmp_path)) == expected
