"""Packed linear layers against F.linear in fp64, for every way a weight can be packed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.linear.linear import linear, pack_linear, packed_rows
from kernels.native import library as native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = [*native.levels(), "torch"]
# Rows, outputs and inputs around the register tile, the panel of 64, the chunk of 96 rows, the piece of 512.
SIZES = [(1, 64, 64), (7, 100, 130), (1, 1, 8), (97, 65, 72), (13, 200, 2050), (200, 130, 96)]


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


def test_no_rows() -> None:
    packed = pack_linear(torch.randn(10, 16), None)
    assert linear(torch.empty(0, 16), packed).shape == (0, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_leaves_the_original_alone_and_rows_can_be_read_back(dtype: torch.dtype) -> None:
    weight_OI = torch.randn(150, 48).to(dtype)
    before = weight_OI.clone()
    packed = pack_linear(weight_OI, None)
    assert torch.equal(weight_OI, before)
    ids = torch.tensor([0, 149, 64, 63, 64])
    assert packed.kind == "onednn" or torch.equal(packed_rows(packed, ids), before[ids])


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
