"""Linears in Triton: weights in 4, 8 and 16 bits against fp64, and that rows do not depend on each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kernels.linear import fp8
from kernels.linear.quantized import dequantize, quantize
from kernels.types import PackedLinear, QuantizedWeight
from tests.helpers.kernels import assert_as_good, multiply_rows_alike, poisoned_memory


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeroed(w: QuantizedWeight) -> QuantizedWeight:
    """The weight with a zero of its own for each group."""
    zero_OG = torch.randint(-5, 6, w.scale_OG.shape, generator=torch.Generator().manual_seed(3)).to(
        torch.int8
    )
    return QuantizedWeight(w.bits, w.value_OI, w.scale_OG, zero_OG, w.order_I)


def on(device: str, w: QuantizedWeight) -> QuantizedWeight:
    parts = (w.value_OI, w.scale_OG, w.zero_OG, w.order_I)
    return QuantizedWeight(w.bits, *(None if x is None else x.to(device) for x in parts))  # type: ignore[arg-type]


def check(packed: PackedLinear, weight_OI: Tensor, x_TI: Tensor, device: str) -> None:
    from kernels.linear import triton

    bias = 0 if packed.bias_O is None else packed.bias_O.cpu().double()
    exact = x_TI.double() @ weight_OI.double().T + bias
    plain = (x_TI.double() @ weight_OI.double().T + bias).to(x_TI.dtype)
    with poisoned_memory():
        for deterministic in (False, True):
            got = triton.linear(x_TI.to(device), dataclasses.replace(packed, deterministic=deterministic))
            assert_as_good(got.cpu(), exact, plain, atol=2e-3)


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs as a GPU would have, so that inputs are cut into segments."""
    from kernels.linear import triton

    monkeypatch.setattr(triton, "multiprocessors", lambda device: 8)
    triton.linear_config.cache_clear()
    yield
    triton.linear_config.cache_clear()


@pytest.mark.parametrize("rows", [1, 20, 70])
@pytest.mark.parametrize(
    ("bits", "group", "inputs"),
    [(4, 128, 512), (4, 32, 352), (4, 64, 448), (4, 0, 490), (8, 0, 500), (8, 16, 272), (8, 128, 384)],
)
def test_quantised_weights(device: str, spread: None, bits: int, group: int, inputs: int, rows: int) -> None:
    from kernels.linear import triton

    w = zeroed(quantize(randn(80, inputs, seed=1), bits, group))
    bias_O = randn(80, seed=2).to(torch.bfloat16).to(device)
    x_TI = randn(rows, inputs).to(torch.bfloat16)
    check(triton.pack(on(device, w), bias_O), dequantize(w, torch.float64), x_TI, device)


@pytest.mark.parametrize("inputs", [4096, 11008, 18944])
def test_the_groups_of_checkpoints_are_taken(inputs: int) -> None:
    """What GPTQ, AWQ and compressed-tensors write: groups of 32, 64, 128, 256 and 1024, or the whole row."""
    from kernels.linear import triton

    sizes = [size for size in (32, 64, 128, 256, 1024, inputs) if inputs % size == 0]
    assert all(triton.step_of(inputs, inputs // size) for size in sizes)


def test_inputs_in_another_order(device: str) -> None:
    from kernels.linear import triton

    w = quantize(randn(64, 256, seed=1), 4, 64)
    order_I = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    w = QuantizedWeight(4, w.value_OI, w.scale_OG, None, order_I)
    x_TI = randn(3, 300).to(torch.float16)[:, 20:276]
    check(triton.pack(on(device, w), None), dequantize(w, torch.float64), x_TI, device)


@pytest.mark.parametrize("rows", [1, 70])
def test_weights_in_fp8(device: str, spread: None, rows: int) -> None:
    from kernels.linear import triton

    scale_OG = torch.rand(48, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    value_OI = randn(48, 512, seed=1).to(torch.float8_e4m3fn)
    w = QuantizedWeight(8, value_OI, scale_OG)
    x_TI = randn(rows, 512).to(torch.bfloat16)
    check(triton.pack(on(device, w), None), dequantize(w, torch.float64), x_TI, device)


@pytest.mark.parametrize("kind", ["bf16", "int4", "int8"])
def test_rows_do_not_depend_on_each_other(
    device: str, spread: None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.linear import triton

    if device == "cpu":
        multiply_rows_alike(monkeypatch)
    weight_OI = randn(80, 512, seed=1)
    if kind == "bf16":
        packed = triton.pack_16_bits(weight_OI.to(torch.bfloat16).to(device), None)
    else:
        packed = triton.pack(on(device, quantize(weight_OI, int(kind[3:]), 64)), None, deterministic=True)
    x_TI = randn(130, 512).to(torch.bfloat16).to(device)
    together = triton.linear(x_TI, packed)
    exact = x_TI.cpu().double() @ weight_OI.to(torch.bfloat16).double().T
    if kind == "bf16":
        assert_as_good(together.cpu(), exact, exact.to(torch.bfloat16), atol=2e-3)
    for first, end in ((0, 1), (64, 65), (3, 40), (60, 130)):
        part = triton.linear(x_TI[first:end], packed)
        assert torch.equal(part, together[first:end]), f"rows {first} to {end}"


def test_inputs_rounded_to_fp8(device: str) -> None:
    from kernels.linear.triton_round import round_rows

    x_TI = randn(5, 200).to(torch.bfloat16) * torch.tensor([[1.0], [1e4], [1e-4], [0.0], [1.0]])
    x_TI = x_TI.to(torch.bfloat16).to(device)
    x_TI[4, 3] = float("nan")
    value_TI, scale_T1 = round_rows(x_TI)
    want, want_scale = fp8.round_rows(x_TI.cpu())
    torch.testing.assert_close(scale_T1.cpu()[:4], want_scale[:4])
    back_TI, wanted_TI = value_TI.cpu().float() * scale_T1.cpu(), want.float() * want_scale
    # A rounding either way where a scale differs in its last bit: an eighth of a number, at most.
    torch.testing.assert_close(back_TI[:4], wanted_TI[:4], rtol=0.13, atol=1e-6)
    assert back_TI[4].isnan().all(), "what is not finite must not look as if it were"


def test_weights_and_inputs_in_fp8() -> None:
    value_OI = randn(48, 64, seed=1).to(torch.float8_e4m3fn)
    w = QuantizedWeight(8, value_OI, torch.rand(48, 1) + 0.5)
    x_TI, bias_O = randn(7, 64).to(torch.bfloat16), randn(48).to(torch.bfloat16)
    got = fp8.linear_fp8(x_TI, fp8.pack(w, bias_O))
    value_TI, scale_T1 = fp8.round_rows(x_TI)
    own = (value_TI.double() * scale_T1) @ dequantize(w, torch.float64).T + bias_O
    torch.testing.assert_close(got.double(), own, rtol=1e-2, atol=1e-2)
    exact = x_TI.double() @ dequantize(w, torch.float64).T + bias_O
    assert (got.double() - exact).norm() < 0.04 * exact.norm()
