"""Weights in integers: how well they are chosen, and products with them against the floats they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.api import QuantizedWeight, dequantize, linear, pack_quantized, quantize
from kernels.native import library as native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = [*native.levels(), "torch"]
# Rows, outputs, inputs; more than one chunk of rows, odd outputs, and inputs that leave half a byte.
SIZES = [(1, 64, 128), (7, 100, 256), (33, 1100, 384), (2, 65, 131)]


def weight(outputs: int, inputs: int, bits: int, groups: int, *, zero: bool, order: bool) -> QuantizedWeight:
    """Every value, zero and order may occur."""
    generator = torch.Generator().manual_seed(outputs)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)

    return QuantizedWeight(
        bits,
        integers(outputs, inputs),
        torch.rand(outputs, groups, generator=generator) - 0.3,
        integers(outputs, groups) if zero else None,
        torch.randperm(inputs, generator=generator) if order else None,
    )


def by_definition(w: QuantizedWeight) -> torch.Tensor:
    """One number at a time, as the type's docstring says it."""
    outputs, inputs = w.value_OI.shape
    per_group = inputs // w.scale_OG.shape[1]
    out = torch.full((outputs, inputs), float("nan"), dtype=torch.float64)
    for j in range(inputs):
        g = j // per_group
        zero_O = 0 if w.zero_OG is None else w.zero_OG[:, g].double()
        i = j if w.order_I is None else int(w.order_I[j])
        out[:, i] = (w.value_OI[:, j].double() - zero_O) * w.scale_OG[:, g].double()
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "zero, order, bias", [(False, False, False), (True, False, True), (True, True, False)]
)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows, outputs, inputs", SIZES)
def test_product_is_that_of_the_dequantised_weight(
    rows: int, outputs: int, inputs: int, bits: int, zero: bool, order: bool, bias: bool,
    dtype: torch.dtype, level: str,
) -> None:  # fmt: skip
    torch.manual_seed(rows)
    for groups in {1, inputs // 32 if inputs % 32 == 0 else 1}:
        w = weight(outputs, inputs, bits, groups, zero=zero, order=order)
        x_TI = torch.randn(rows, inputs).to(dtype)
        bias_O = torch.randn(outputs).to(dtype) if bias else None
        exact = F.linear(x_TI.double(), by_definition(w), None if bias_O is None else bias_O.double())
        with native.using(level, threads=1 + rows % 2):
            got = linear(x_TI, pack_quantized(w, bias_O, dtype))
        assert got.dtype == dtype and got.shape == exact.shape
        # Of each product: rounding the result, and in bf16 the weight, which plain torch multiplies in; or
        # the input, which the library rounds to 15 bits of the largest.
        fp32 = 2e-6 if level == "torch" else 1e-4
        step = {torch.float32: fp32, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        size = F.linear(x_TI.double().abs().square(), by_definition(w).square()).sqrt()
        assert ((got.double() - exact).abs() <= step * (4 * size + exact.abs() + 1)).all()


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_the_others(bits: int, level: str) -> None:
    """Sums of integers have no order; what is not finite stays in its row."""
    packed = pack_quantized(
        weight(100, 768, bits, 1 if bits == 8 else 6, zero=True, order=False), None, torch.float32
    )
    x_TI = torch.randn(40, 768)
    x_TI[7, 300], x_TI[8, 5] = float("nan"), float("inf")
    with native.using(level):
        together = linear(x_TI, packed)
        for row in (0, 6, 39):
            assert torch.equal(linear(x_TI[row : row + 1], packed)[0], together[row])
    finite = together.isfinite().all(1)
    assert not together[7:9].isfinite().any() and finite.sum() == 38


def test_no_rows_and_a_slice_of_a_wider_tensor() -> None:
    w = weight(70, 64, 4, 2, zero=True, order=True)
    packed = pack_quantized(w, None, torch.float32)
    assert linear(torch.empty(0, 64), packed).shape == (0, 70)
    wide = torch.randn(5, 192)
    assert torch.equal(linear(wide[:, 64:128], packed), linear(wide[:, 64:128].contiguous(), packed))


def test_the_library_takes_no_weight_of_another_device() -> None:
    """Groups of 8 are too small for the Triton kernel, and not for the library."""
    w = weight(64, 64, 4, 8, zero=False, order=False).to(torch.device("meta"))
    assert pack_quantized(w, None, torch.float32).kind == "quantized"


@pytest.mark.parametrize("zero, order", [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(dtype: torch.dtype, zero: bool, order: bool) -> None:
    w = weight(300, 128, 4, 4, zero=zero, order=order)
    assert dequantize(w, dtype).equal(by_definition(w).to(torch.float32).to(dtype))


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits, group, inputs", [(8, 0, 131), (8, 0, 512), (4, 32, 384), (4, 128, 384)])
def test_the_library_rounds_as_torch_does(
    bits: int, group: int, inputs: int, dtype: torch.dtype, level: str
) -> None:
    torch.manual_seed(bits)
    weight_OI = torch.randn(300, inputs).to(dtype)
    weight_OI[5], weight_OI[6, :32], weight_OI[7] = 0, 1e-3, weight_OI[7].abs()
    with native.using("torch"):
        expected = quantize(weight_OI, bits, group)
    with native.using(level):
        got = quantize(weight_OI, bits, group)
    assert got.value_OI.equal(expected.value_OI)
    torch.testing.assert_close(got.scale_OG, expected.scale_OG, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "bits, group, error", [(8, 0, 0.009), (8, 128, 0.0067), (4, 32, 0.086), (4, 128, 0.102)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_errs_little(dtype: torch.dtype, bits: int, group: int, error: float) -> None:
    weight_OI = (torch.randn(700, 1024, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    w = quantize(weight_OI, bits, group)
    assert w.zero_OG is None and w.order_I is None
    got = dequantize(w, torch.float32)
    assert (got - weight_OI.float()).norm() / weight_OI.float().norm() < error
    assert w.value_OI.abs().max() == (127 if bits == 8 else 8)


def test_rows_of_zeros_and_of_one_large_weight() -> None:
    weight_OI = torch.zeros(4, 64)
    weight_OI[1, 5], weight_OI[2, 7], weight_OI[3] = 3.0, -1e-4, 1e4
    for bits, group in ((8, 0), (4, 32)):
        got = dequantize(quantize(weight_OI, bits, group), torch.float32)
        torch.testing.assert_close(got, weight_OI, rtol=1e-5, atol=0)


def test_memory_is_what_the_bits_say() -> None:
    weight_OI = torch.randn(128, 256)
    for bits, group in ((8, 0), (4, 32), (4, 128)):
        packed = pack_quantized(quantize(weight_OI, bits, group), None, torch.bfloat16)
        scales = 128 * (256 // (group or 256)) * (4 if bits == 8 else 2)
        assert 128 * 256 * bits // 8 < packed.num_bytes <= 128 * 256 * bits // 8 + scales


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bits": 3}, "4 or 8 bits"),
        ({"value_OI": torch.zeros(8, 64)}, "must be int8"),
        ({"scale_OG": torch.ones(8, 3)}, "do not fit"),
        ({"scale_OG": torch.ones(7, 2)}, "do not fit"),
        ({"scale_OG": torch.ones(8, 2).half()}, "must be fp32"),
        ({"zero_OG": torch.zeros(8, 1, dtype=torch.int8)}, "zeros must be int8"),
        ({"order_I": torch.arange(63)}, "one entry per input"),
    ],
)
def test_weights_that_contradict_themselves(change: dict[str, object], words: str) -> None:
    parts: dict[str, object] = {
        "bits": 4, "value_OI": torch.zeros(8, 64, dtype=torch.int8), "scale_OG": torch.ones(8, 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        QuantizedWeight(**{**parts, **change})  # type: ignore[arg-type]
