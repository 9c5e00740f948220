"""The CPU backend's sampling ops against their references, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.logprobs import reference as logprobs_reference
from kernels.logprobs.cpu import logprobs
from kernels.mask_tokens import reference as mask_tokens_reference
from kernels.mask_tokens.cpu import mask_tokens
from kernels.native import library as native
from kernels.penalize import reference as penalize_reference
from kernels.penalize.cpu import penalize
from kernels.sample import reference
from kernels.sample.cpu import sample
from kernels.types import PenaltyParams, SampleParams

LEVELS = [*native.levels(), "torch"]


def params(rows: int, **knobs: float) -> SampleParams:
    """Parameters of distinct seeds and positions; the given knobs are the same for every row."""
    generator = torch.Generator().manual_seed(1)
    return SampleParams(
        temperature_S=torch.full((rows,), knobs.get("temperature", 1.0)),
        top_k_S=torch.full((rows,), int(knobs.get("top_k", 0)), dtype=torch.int32),
        top_p_S=torch.full((rows,), knobs.get("top_p", 1.0)),
        min_p_S=torch.full((rows,), knobs.get("min_p", 0.0)),
        seed_S=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        position_S=torch.randint(0, 2**40, (rows,), generator=generator),
        all_greedy=False,
        any_filter=any(knob in knobs for knob in ("top_k", "top_p", "min_p")),
    )


def logits(rows: int, vocabulary: int, spread: float = 4.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0, "top_k": 1},
    {"top_k": 40},
    {"temperature": 2.0, "top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 0.0},
    {"temperature": 3.0, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1e-9, "top_p": 0.9},
    {"top_k": 100000},
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("knobs", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 1000, 4099])
def test_the_tokens_are_the_references(vocabulary: int, knobs: dict[str, float], level: str) -> None:
    logits_SV, given = logits(64, vocabulary), params(64, **knobs)
    with native.using(level):
        got = sample(logits_SV, given)
    expected = reference.sample(logits_SV, given)
    # Noise may differ in its last bit, so a near tie may fall the other way: never in these 64 rows.
    assert torch.equal(got, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_greedy_takes_the_lowest_of_equals(level: str) -> None:
    logits_SV = torch.zeros(4, 300)
    logits_SV[1, 250] = logits_SV[1, 17] = 3.0
    logits_SV[2, :] = float("-inf")
    logits_SV[2, 299] = -1e30
    logits_SV[3, 33] = float("inf")
    with native.using(level):
        assert sample(logits_SV, params(4, temperature=0.0)).tolist() == [0, 17, 299, 33]
        assert sample(logits_SV, params(4, temperature=-1.0, top_p=0.5)).tolist() == [0, 17, 299, 33]


@pytest.mark.parametrize("level", LEVELS)
def test_masked_tokens_are_never_drawn(level: str) -> None:
    """A grammar's mask is logits of -inf."""
    logits_SV = torch.full((200, 130), float("-inf"))
    logits_SV[:, 7] = logits_SV[:, 129] = 0.0
    with native.using(level):
        for knobs in ({}, {"top_p": 0.9999999}, {"top_k": 5}, {"min_p": 0.1}):
            assert set(sample(logits_SV, params(200, **knobs)).tolist()) == {7, 129}


@pytest.mark.parametrize("level", native.levels())
def test_equal_logits_stay_together(level: str) -> None:
    logits_SV = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(300, 1)
    with native.using(level):
        for knobs in ({"top_k": 1}, {"top_k": 3}, {"top_p": 0.1}):
            assert set(sample(logits_SV, params(300, **knobs)).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("level", native.levels())
def test_nan_and_infinite_logits_give_a_token(level: str) -> None:
    logits_SV = logits(6, 50)
    logits_SV[0] = float("nan")
    logits_SV[1, 3] = float("nan")
    logits_SV[2, 4] = float("inf")
    logits_SV[3] = float("-inf")
    with native.using(level):
        for knobs in ({}, {"top_p": 0.5, "top_k": 9}, {"top_p": 0.5}, {"min_p": 0.5}):
            token_S = sample(logits_SV, params(6, **knobs))
            assert ((token_S >= 0) & (token_S < 50)).all() and token_S[2] == 4


@pytest.mark.parametrize("level", LEVELS)
def test_penalties(level: str) -> None:
    torch.manual_seed(0)
    expected_SV = torch.randn(5, 333)
    got_SV = expected_SV.clone()
    given = PenaltyParams(
        row_S=torch.tensor([2, -1, 0, 1, -1]),
        output_count_UV=torch.randint(0, 3, (3, 333), dtype=torch.int32),
        prompt_seen_UV=torch.rand(3, 333) < 0.3,
        presence_S=torch.tensor([0.5, 9.0, 0.0, -1.0, 9.0]),
        frequency_S=torch.tensor([0.2, 9.0, 1.5, 0.0, 9.0]),
        repetition_S=torch.tensor([1.3, 9.0, 1.0, 0.7, 9.0]),
    )
    penalize_reference.penalize(expected_SV, given)
    with native.using(level):
        penalize(got_SV, given)
    torch.testing.assert_close(got_SV, expected_SV)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocabulary, top", [(40, 0), (40, 40), (5003, 20), (9, 1)])
def test_logprobs(vocabulary: int, top: int, level: str) -> None:
    logits_SV = logits(6, vocabulary)
    logits_SV[1, 2:5] = float("-inf")
    token_S = torch.arange(6)
    with native.using(level):
        chosen_S, ids_SK, top_SK = logprobs(logits_SV, token_S, top)
    expected_S, expected_ids_SK, expected_SK = logprobs_reference.logprobs(logits_SV, token_S, top)
    torch.testing.assert_close(chosen_S, expected_S, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top_SK, expected_SK, rtol=1e-5, atol=1e-5)
    finite = expected_SK.isfinite()
    assert torch.equal(ids_SK[finite], expected_ids_SK[finite])


@pytest.mark.parametrize("level", native.levels())
def test_equal_logprobs_come_once_each(level: str) -> None:
    with native.using(level):
        _, ids_SK, top_SK = logprobs(torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]), torch.tensor([0]), 3)
    assert ids_SK.tolist() == [[1, 0, 2]] and top_SK[0, 1] == top_SK[0, 2]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocabulary", [7, 32, 4099])
def test_masks_are_the_references(vocabulary: int, level: str) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    words_KW = torch.randint(
        -(2**31), 2**31 - 1, (5, vocabulary // 32 + 1), generator=generator, dtype=torch.int32
    )
    expected_SV = logits(8, vocabulary)
    got_SV, row_K = expected_SV.clone(), torch.tensor([7, 0, 3, 4, 1])
    mask_tokens_reference.mask_tokens(expected_SV, words_KW, row_K)
    with native.using(level):
        mask_tokens(got_SV, words_KW, row_K)
    assert torch.equal(got_SV, expected_SV)
    assert got_SV.isinf().any()
