"""Sampling: the noise to the bit, filters against a sort, draws against softmax, Triton against both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.sample import reference
from tests.helpers.kernels import poisoned_memory, sample_params

VOCABULARY = 5000


def logits(rows: int, vocabulary: int = VOCABULARY, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(7)) * spread


def kept_by_sorting(row_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The filters one after another, each over the tokens that the one before left, in fp64."""
    probability = (row_V.double() / temperature).softmax(0)
    kept = sorted(range(len(row_V)), key=lambda i: -row_V[i].item())
    if top_k > 0:
        border = row_V[kept[min(top_k, len(kept)) - 1]]
        kept = [i for i in kept if row_V[i] >= border]
    if top_p < 1:
        target = top_p * sum(probability[i].item() for i in kept)
        above, nucleus = 0.0, []
        for i in kept:
            if above < target or row_V[i] == row_V[nucleus[-1]]:
                nucleus.append(i)
            above += probability[i].item()
        kept = nucleus
    return {i for i in kept if probability[i] >= min_p * probability.max()}


FILTERS = [
    (1.0, 1, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (1.0, 0, 0.02, 0.0),
    (1.3, 40, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (2.0, 30, 0.95, 0.03),
    (1e-9, 0, 0.5, 0.0),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0, 1.0),
]


@pytest.mark.parametrize("knobs", FILTERS)
def test_the_reference_keeps_what_sorting_keeps(knobs: tuple[float, int, float, float]) -> None:
    row_V = logits(1, 300)[0]
    temperature = max(knobs[0], 1e-6)
    threshold = reference.lowest_kept(row_V, temperature, *knobs[1:])
    kept = set(torch.nonzero(row_V >= threshold).flatten().tolist())
    assert kept == kept_by_sorting(row_V, temperature, *knobs[1:])


def rows_of(knobs: list[tuple[float, int, float, float]], device: str = "cpu") -> dict[str, object]:
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: list(column) for name, column in zip(names, zip(*knobs, strict=True), strict=True)} | {
        "device": device
    }


@pytest.mark.parametrize("parts", [1, 4])
def test_the_search_finds_the_same_thresholds(device: str, parts: int) -> None:
    from kernels.sample import triton

    logits_SV = logits(len(FILTERS), 700)
    logits_SV[:, 100:200] = logits_SV[:, :100]  # ties
    logits_SV[:, 300:350] = float("-inf")  # masked by a grammar
    params = sample_params(len(FILTERS), **rows_of(FILTERS, device))
    got_S = triton.lowest_kept(logits_SV.to(device), params, parts)
    assert torch.equal(got_S, triton.lowest_kept(logits_SV.to(device), params, 1)), "to the last bit"
    for row_V, got, knobs in zip(logits_SV, got_S.cpu(), FILTERS, strict=True):
        temperature = max(knobs[0], 1e-6)
        want = reference.lowest_kept(row_V, temperature, *knobs[1:])
        assert torch.equal(row_V >= got, row_V >= want), knobs


@pytest.mark.parametrize("parts", [1, 5])
def test_the_search_survives_odd_rows(device: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.sample import triton, triton_search

    monkeypatch.setattr(
        triton, "lowest_kept", lambda logits_SV, params: triton_search.lowest_kept(logits_SV, params, parts)
    )

    rows = torch.full((6, 64), float("-inf"))
    rows[0, 5] = 1.0
    rows[1, 3], rows[1, 9] = 3e38, -3e38
    rows[2, 7] = float("inf")
    rows[3] = 2.5
    rows[4, ::2] = torch.linspace(-1e-30, 1e-30, 32)
    params = sample_params(6, top_k=2, top_p=0.9, min_p=0.01, seed=list(range(6)), device=device)
    got = triton.sample(rows.to(device), params)
    want = reference.sample(rows, sample_params(6, top_k=2, top_p=0.9, min_p=0.01, seed=list(range(6))))
    assert got.tolist() == want.tolist()
    assert got[0] == 5 and got[1] == 3 and got[2] == 7


@pytest.mark.parametrize("filtered", [False, True])
def test_triton_draws_the_reference_tokens(device: str, filtered: bool) -> None:
    from kernels.sample import triton

    rows = 12
    logits_SV = logits(rows)
    knobs: dict[str, object] = {
        "temperature": [0.0, 1e-30] + [0.3, 1.0, 1.7, 5.0, 100.0] * 2,
        "seed": [(-1) ** i * (0x9E3779B97F4A7C15 * i % 2**62) for i in range(rows)],
        "position": [7**i for i in range(rows)],
    }
    if filtered:
        knobs |= {"top_k": [0, 3, 0, 50] * 3, "top_p": [1.0, 0.9, 0.5] * 4, "min_p": [0.0, 0.02] * 6}
    with poisoned_memory():
        got = triton.sample(logits_SV.to(device), sample_params(rows, **knobs, device=device))
    assert got.dtype == torch.int64
    assert got.tolist() == reference.sample(logits_SV, sample_params(rows, **knobs)).tolist()


def test_greedy_takes_the_lowest_of_equals(device: str) -> None:
    from kernels.sample import triton

    logits_SV = torch.zeros(3, VOCABULARY)
    logits_SV[1, 4000:] = 1.0
    logits_SV[2] = float("-inf")
    greedy = sample_params(3, temperature=0.0, device=device)
    assert greedy.all_greedy
    assert triton.sample(logits_SV.to(device), greedy).tolist() == [0, 4000, 0]
    assert reference.sample(logits_SV, sample_params(3, temperature=0.0)).tolist() == [0, 4000, 0]


def test_rows_of_nan_still_yield_an_id(device: str) -> None:
    from kernels.sample import triton

    logits_SV = torch.full((2, 100), float("nan"), device=device)
    params = sample_params(2, temperature=[0.0, 1.0], top_k=5, top_p=0.5, device=device)
    assert all(0 <= token < 100 for token in triton.sample(logits_SV, params).tolist())


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits_SV = logits(4) * 1e4
    cold = reference.sample(logits_SV, sample_params(4, temperature=1e-38, top_p=0.99, seed=3))
    assert cold.tolist() == logits_SV.argmax(-1).tolist()


def chi_square(tokens: Tensor, probability_V: Tensor) -> float:
    expected = probability_V.double() * len(tokens)
    observed = torch.bincount(tokens, minlength=len(probability_V)).double()
    possible = expected > 0
    assert not observed[~possible].any()
    return float(((observed - expected)[possible] ** 2 / expected[possible]).sum())


@pytest.mark.parametrize("vary", ["seed", "position", "both"])
@pytest.mark.parametrize("top_k", [0, 4])
def test_draws_follow_softmax(vary: str, top_k: int) -> None:
    rows, size = 4000, 8
    row_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0])
    count = list(range(rows))
    knobs = {"seed": count if vary != "position" else 5, "position": count if vary != "seed" else 9}
    params = sample_params(rows, temperature=0.8, top_k=top_k, **knobs)
    tokens = reference.sample(row_V.expand(rows, size).contiguous(), params)
    probability_V = row_V / 0.8
    if top_k:
        probability_V[row_V < row_V.topk(top_k).values[-1]] = float("-inf")
    # 24.3 is the 99.9th percentile with 7 degrees of freedom. The draw is deterministic: no flakes.
    assert chi_square(tokens, probability_V.softmax(0)) < 24.3


def test_neighbouring_streams_are_independent() -> None:
    """Joint counts of two consecutive positions, over seeds, against the product of the marginals."""
    rows = 5000
    logits_SV = torch.zeros(rows, 4)
    seeds = list(range(rows))
    first, second = (
        reference.sample(logits_SV, sample_params(rows, seed=seeds, position=p)) for p in (10, 11)
    )
    assert chi_square(first * 4 + second, torch.full((16,), 1 / 16)) < 37.7  # 99.9th percentile, 15 degrees


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    from kernels.sample import triton

    logits_SV = logits(6).to(device)
    knobs = {"seed": list(range(6)), "position": [3] * 6, "top_p": [0.9, 1.0] * 3}
    together = triton.sample(logits_SV, sample_params(6, **knobs, device=device)).tolist()
    order = [4, 1]
    some = {name: [values[i] for i in order] for name, values in knobs.items()}
    apart = triton.sample(logits_SV[order], sample_params(2, **some, device=device)).tolist()
    assert apart == [together[i] for i in order]


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def noise(seed: int, position: int, token: int) -> float:
    """The README's definition, with Python's integers and doubles."""
    words = [seed % 2**32, seed >> 32 & 0xFFFFFFFF, position % 2**32, position >> 32]
    bits = token
    for key in (0x9E3779B9, 0x85EBCA6B):
        for word in words:
            key = mix(key ^ word)
        bits = mix(bits ^ key)
    uniform = min((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1 << 32])
@pytest.mark.parametrize("position", [0, 1, 2**32, 2**40 + 3])
def test_the_noise_is_the_readmes(seed: int, position: int) -> None:
    got_V = reference.gumbel_noise(torch.tensor(seed), torch.tensor(position), 50)
    want_V = torch.tensor([noise(seed, position, token) for token in range(50)])
    torch.testing.assert_close(got_V, want_V, rtol=2e-6, atol=2e-6)


def test_every_bit_of_seed_and_position_matters() -> None:
    base = reference.gumbel_noise(torch.tensor(0), torch.tensor(0), 8)
    for bit in range(64):
        one = torch.tensor(1) << bit
        assert not torch.equal(base, reference.gumbel_noise(one, torch.tensor(0), 8))
        assert not torch.equal(base, reference.gumbel_noise(torch.tensor(0), one, 8))
