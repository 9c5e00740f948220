"""Packed linear layers against F.linear in fp64, for every way a weight can be packed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.linear.linear import linear, pack_linear
from kernels.native import library as native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = [*native.levels(), "torch"]
# Rows, outputs and inputs around the register tile, the panel of 64, the chunk of 48 rows, the pieces of 64
# to 512.
SIZES = [
    (1, 64, 64),
    (7, 100, 130),
    (1, 1, 8),
    (97, 65, 72),
    (13, 200, 2050),
    (200, 130, 96),
    (101, 70, 1088),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, outputs, inputs", SIZES)
def test_linear_is_as_exact_as_torch(
    rows: int, outputs: int, inputs: int, bias: bool, dtype: torch.dtype, level: str
) -> None:
    torch.manual_seed(rows)
    x_TI, weight_OI = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias_O = torch.randn(outputs).to(dtype) if bias else None
    exact = F.linear(x_TI.double(), weight_OI.double(), None if bias_O is None else bias_O.double())
    torch_error = (F.linear(x_TI, weight_OI, bias_O).double() - exact).abs().max()
    with native.using(level, threads=1 + rows % 2):
        got = linear(x_TI, pack_linear(weight_OI.clone(), bias_O))
    assert got.dtype == dtype and got.shape == exact.shape
    # What rounding the exact result costs, and what fp32 sums of that many products may lose.
    rounding = (exact.to(dtype).double() - exact).abs().max()
    assert (got.double() - exact).abs().max() <= 2 * torch.maximum(torch_error, rounding) + 1.2e-7 * inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_rows_may_be_a_slice(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide, weight_OI = torch.randn(9, 96).to(dtype), torch.randn(70, 32).to(dtype)
    packed = pack_linear(weight_OI.clone(), None)
    assert torch.equal(linear(wide[:, 32:64], packed), linear(wide[:, 32:64].contiguous(), packed))
    assert torch.equal(linear(wide.t()[:32].t(), packed), linear(wide[:, :32].contiguous(), packed))


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="63 inputs for a weight of 64"):
        linear(torch.randn(2, 63), pack_linear(torch.randn(5, 64), None))


def test_no_rows() -> None:
    packed = pack_linear(torch.randn(10, 16), None)
    assert linear(torch.empty(0, 16), packed).shape == (0, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_leaves_the_original_alone(dtype: torch.dtype) -> None:
    weight_OI = torch.randn(150, 48).to(dtype)
    before = weight_OI.clone()
    pack_linear(weight_OI, None)
    assert torch.equal(weight_OI, before)


def test_an_odd_number_of_inputs_in_bf16() -> None:
    x_TI, weight_OI = torch.randn(3, 33).bfloat16(), torch.randn(20, 33).bfloat16()
    torch.testing.assert_close(linear(x_TI, pack_linear(weight_OI, None)), F.linear(x_TI, weight_OI))


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype, level: str) -> None:
    """Whichever way that many rows go: a batch must not change what a request reads."""
    x_TI, weight = torch.randn(200, 770).to(dtype), torch.randn(300, 770).to(dtype)
    with native.using(level):
        packed = pack_linear(weight, None)
        together = linear(x_TI, packed)
        for rows in (1, 2, 3, 4, 5, 7, 16, 97):
            assert torch.equal(linear(x_TI[:rows], packed), together[:rows]), rows


@pytest.mark.skipif(
    native.library() is None or native.multiplies_bf16(), reason="bf16 is multiplied as it is here"
)
def test_bf16_as_integers_keeps_large_weights_exactly_and_loses_little_of_small_ones() -> None:
    """Outliers, subnormals and empty groups; one row at a time reads the weight itself back."""
    torch.manual_seed(0)
    weight_OI = (torch.randn(70, 128) * 10.0 ** torch.arange(-35, 35).unsqueeze(1)).bfloat16()
    weight_OI[3, :64], weight_OI[4, 70], weight_OI[5] = 0, 3e4 * weight_OI[4, 70], 1e-40
    packed = pack_linear(weight_OI, None)
    assert (packed.kind, packed.bits) == ("native_quantized", 12)
    read_OI = linear(torch.eye(128), packed).T
    largest_OG = weight_OI.float().abs().view(70, 2, 64).amax(-1, keepdim=True)
    error_OGJ = (read_OI - weight_OI.float()).abs().view(70, 2, 64)
    assert (error_OGJ <= largest_OG / 2048 + 1e-36).all()
    kept = weight_OI.float().abs().view(70, 2, 64) >= largest_OG / 8
    assert (error_OGJ[kept] <= 2e-4 * weight_OI.float().abs().view(70, 2, 64)[kept] + 1e-36).all()


def test_infinite_weights_are_not_rounded() -> None:
    weight_OI = torch.ones(64, 64).bfloat16()
    weight_OI[2, 3] = float("inf")
    y_TO = linear(torch.ones(5, 64).bfloat16(), pack_linear(weight_OI, None))
    assert y_TO[:, 2].isinf().all() and (y_TO[:, 3] == 64).all()
