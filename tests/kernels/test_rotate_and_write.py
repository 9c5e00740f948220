"""The op between a projection and attention: the Triton kernel against fp64, and in 8 bits byte by byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import api
from kernels.kv_format import dequantize, kv_width
from kernels.rotate_and_write import reference
from kernels.types import HeadNorms
from kernels.write_kv import reference as write_reference
from tests.helpers.kernels import assert_as_good, poisoned_memory, slab_rows

P = 16
SLOTS = [3 * P - 1, P, -1, 2 * P + 5]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


def inputs(head_dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, HeadNorms, Tensor, Tensor]:
    """Projections of 6 + 3 + 3 heads, norms, a rotary table's angles, positions."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(len(SLOTS), 12, head_dim, generator=generator).to(dtype).to(device)
    weights = (torch.rand(2, head_dim, generator=generator) + 0.5).to(dtype).to(device)
    norms = HeadNorms(weights[0], weights[1], 1e-6, 1.0)
    return (
        qkv,
        norms,
        torch.randn(20, head_dim, generator=generator),
        torch.tensor([0, 19, 3, 7], device=device),
    )


def table(angle_MD: Tensor, rotary_dim: int, device: str) -> Tensor:
    half_MR = angle_MD[:, : rotary_dim // 2]
    return torch.cat((half_MR.cos(), half_MR.sin()), -1).to(device)


def plain(x: Tensor, weight_D: Tensor | None, cos_sin_TR: Tensor, dtype: torch.dtype) -> Tensor:
    """Norm and rotation, straight from their definitions, computed in `dtype`."""
    x = x.to(dtype)
    if weight_D is not None:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (weight_D.to(dtype) + 1.0)
    cos, sin = cos_sin_TR.to(dtype)[:, None].chunk(2, -1)
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "dtype"),
    [(32, 32, torch.float32), (64, 64, torch.bfloat16), (80, 32, torch.float16), (128, 128, torch.bfloat16)],
)
def test_against_fp64(
    device: str, head_dim: int, rotary_dim: int, dtype: torch.dtype, with_norms: bool
) -> None:
    from kernels.rotate_and_write import triton

    qkv, norms, angle_MD, position_T = inputs(head_dim, dtype, device)
    cos_sin_MR = table(angle_MD, rotary_dim, device)
    weights = (norms.q_weight_D, norms.k_weight_D) if with_norms else (None, None)
    before = qkv.clone()
    want = [
        [plain(x, weight, cos_sin_MR[position_T], d) for d in (torch.float64, dtype)]
        for x, weight in zip((before[:, :6], before[:, 6:9]), weights, strict=True)
    ]
    for op in (reference, triton):
        qkv.copy_(before)
        kv_N2GPD = torch.full((4, 2, 3, P, head_dim), float("nan"), dtype=dtype, device=device)
        with poisoned_memory():
            q_THD = op.rotate_and_write(
                qkv[:, :6], qkv[:, 6:9], qkv[:, 9:], cos_sin_MR, position_T, kv_N2GPD,
                torch.tensor(SLOTS, device=device), norms if with_norms else None,
            )  # fmt: skip
        assert_as_good(q_THD, *want[0], atol=1e-5)
        for token, slot in enumerate(SLOTS):
            if slot >= 0:
                k_2GD = kv_N2GPD[slot // P, :, :, slot % P]
                assert_as_good(k_2GD[0], *(x[token] for x in want[1]), atol=1e-5)
                assert torch.equal(k_2GD[1], before[token, 9:])
        assert int(kv_N2GPD.isfinite().sum()) == 3 * 2 * 3 * head_dim


def test_on_a_cpu_it_is_the_three_ops_one_after_another() -> None:
    qkv, norms, angle_MD, position_T = inputs(64, torch.float32, "cpu")
    cos_sin_MR, slot_T = table(angle_MD, 64, "cpu"), torch.tensor(SLOTS)
    kv_N2GPD = torch.zeros(4, 2, 3, P, 64)
    q_THD = api.rotate_and_write(
        qkv[:, :6].clone(), qkv[:, 6:9].clone(), qkv[:, 9:], cos_sin_MR, position_T, kv_N2GPD, slot_T, norms
    )
    q_again = api.rms_norm(qkv[:, :6], norms.q_weight_D, norms.eps, offset=norms.offset)
    k_again = api.rms_norm(qkv[:, 6:9], norms.k_weight_D, norms.eps, offset=norms.offset)
    api.rotary(q_again, k_again, cos_sin_MR, position_T)
    memory = torch.zeros_like(kv_N2GPD)
    api.write_kv(k_again, qkv[:, 9:], memory, slot_T)
    assert torch.equal(q_THD, q_again) and torch.equal(kv_N2GPD, memory)


@pytest.mark.parametrize("memory", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_rows_in_8_bits_are_the_references(device: str, head_dim: int, memory: torch.dtype) -> None:
    from kernels.write_kv import triton

    qkv, _, _, _ = inputs(head_dim, torch.bfloat16, device)
    qkv[0, 6] = 0.0
    qkv[1, 9, 3] = float("inf")
    k_TGD, v_TGD, slot_T = qkv[:, 6:9], qkv[:, 9:], torch.tensor(SLOTS, device=device)
    shape = (4, 2, 3, P, kv_width(head_dim, memory))
    got, want = (torch.full(shape, -1, dtype=torch.int8, device=device).view(memory) for _ in range(2))
    triton.write_kv(k_TGD, v_TGD, got, slot_T)
    write_reference.write_kv(k_TGD, v_TGD, want, slot_T)
    rows, expected = dequantize(slab_rows(got)), dequantize(want)
    assert torch.equal(rows.isnan(), expected.isnan())
    assert torch.equal(rows.nan_to_num(), expected.nan_to_num())
    assert not rows[SLOTS[0] // P, 0, 0, SLOTS[0] % P].any(), "a row of zeros"
    assert rows[SLOTS[1] // P, 1, 0, SLOTS[1] % P].isnan().all(), "a row that is not finite"
