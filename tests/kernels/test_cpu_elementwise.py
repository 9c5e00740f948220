"""The CPU backend's rms_norm, rotary and silu_mul against their references, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from kernels.native import library as native
from kernels.rms_norm import reference as rms_norm_reference
from kernels.rms_norm.cpu import rms_norm
from kernels.rotary import reference as rotary_reference
from kernels.rotary.cpu import rotary
from kernels.silu_mul import reference as silu_mul_reference
from kernels.silu_mul.cpu import silu_mul

LEVELS = [*native.levels(), "torch"]
# One unit in the last place: both sides compute in fp32 and round once.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(TOLERANCE)

pytestmark = [pytest.mark.parametrize("level", LEVELS), pytest.mark.parametrize("dtype", DTYPES, ids=str)]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows, size", [(1, 64), (3, 37), (5, 1024), (70, 1000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(rows: int, size: int, offset: float, dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(size)
    x_TE, weight_E = torch.randn(rows, size).to(dtype), torch.randn(size).to(dtype)
    residual_TE = torch.randn(rows, size).to(dtype)
    other_TE = residual_TE.clone()
    with native.using(level, 2):
        plain = rms_norm(x_TE, weight_E, 1e-6, offset=offset)
        fused = rms_norm(x_TE, weight_E, 1e-6, offset=offset, residual_TE=residual_TE)
    close(plain, rms_norm_reference.rms_norm(x_TE, weight_E, 1e-6, offset=offset))
    close(fused, rms_norm_reference.rms_norm(x_TE, weight_E, 1e-6, offset=offset, residual_TE=other_TE))
    assert torch.equal(residual_TE, other_TE), "the sum is rounded as torch rounds it"


def test_rms_norm_of_heads_and_of_other_weights(dtype: torch.dtype, level: str) -> None:
    fused = torch.randn(6, 9, 40).to(dtype)
    with native.using(level):
        for x_THE in (fused[:, 2:5], fused[::2, ::3]):
            weight_E = torch.randn(40).to(dtype)
            close(rms_norm(x_THE, weight_E, 1e-5), rms_norm_reference.rms_norm(x_THE, weight_E, 1e-5))
        wide_E = torch.randn(40)
        close(rms_norm(fused[0], wide_E, 1e-5), rms_norm_reference.rms_norm(fused[0], wide_E, 1e-5))


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("dim, rotary_dim", [(64, 64), (80, 48), (24, 10), (128, 128)])
def test_rotary(tokens: int, dim: int, rotary_dim: int, dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(dim)
    expected = torch.randn(tokens, 9, dim).to(dtype)
    got = expected.clone()
    cos_sin_MR, position_T = torch.randn(300, rotary_dim), torch.randint(0, 300, (tokens,))
    rotary_reference.rotary(expected[:, :4], expected[:, 4:6], cos_sin_MR, position_T)
    with native.using(level, 2):
        rotary(got[:, :4], got[:, 4:6], cos_sin_MR, position_T)
    close(got, expected)
    assert torch.equal(got[:, 6:], expected[:, 6:]) and torch.equal(
        got[..., rotary_dim:], expected[..., rotary_dim:]
    )


@pytest.mark.parametrize("rows, size", [(1, 64), (3, 37), (40, 1000), (1, 50000)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_silu_mul(rows: int, size: int, activation: str, dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(size)
    gate_up_T2F = (torch.randn(rows, 2 * size) * 4).to(dtype)
    with native.using(level, 2):
        got = silu_mul(gate_up_T2F, activation=activation)
    close(got, silu_mul_reference.silu_mul(gate_up_T2F, activation=activation))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_at_their_ends(activation: str, dtype: torch.dtype, level: str) -> None:
    gate = torch.tensor([[-60000.0, -100, -88, -20, 0, 20, 88, 60000, float("inf"), float("nan")]]).to(dtype)
    with native.using(level):
        got = silu_mul(torch.cat((gate, torch.ones_like(gate)), 1), activation=activation)[0].float()
    assert (got[:3].abs() < 1e-30).all() and got[4] == 0
    torch.testing.assert_close(got[5:9], gate[0, 5:9].float(), rtol=1e-6, atol=0)
    assert got[9].isnan()
