"""int8 KV memory on the CPU, every instruction set: against what it holds, and against no rounding at all.

Memory is filled with bytes of 0xFF before it is written: the factor of every slot that holds no token is NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.config import KV_FACTOR_BYTES
from kernels import api
from kernels.kv_format import FACTOR_BYTES, dequantize, kv_width, quantize
from kernels.native import library as native
from kernels.paged_attention import reference
from tests.helpers.kernels import PagedCase, paged_case, poisoned_memory
from tests.helpers.native_kv import gather

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = [*native.levels(), "torch"]
BEST = LEVELS[-2] if len(LEVELS) > 1 else "torch"
P = 16
MIXED = {
    "lengths": [1, P - 1, P, P + 1, 63, 65, 8 * P + 2, 33, 150, 129],
    "query_lengths": [1, 1, 1, 1, 1, 1, 1, 33, 70, 2],
}


def poisoned(blocks: int, groups: int, block_size: int, head_dim: int) -> Tensor:
    shape = (blocks, 2, groups, block_size, kv_width(head_dim, torch.int8))
    return torch.full(shape, -1, dtype=torch.int8)


@dataclass(frozen=True)
class Int8Case:
    """The tokens of a paged case, to be written one by one; and what they are once they were rounded."""

    plain: PagedCase
    rounded: PagedCase
    k_UGD: Tensor
    v_UGD: Tensor
    slot_U: Tensor

    def written(self) -> Tensor:
        blocks, _, groups, block_size, head_dim = self.plain.kv_N2GPD.shape
        kv = poisoned(blocks, groups, block_size, head_dim)
        api.write_kv(self.k_UGD, self.v_UGD, kv, self.slot_U)
        return kv


@functools.cache
def int8_case(dtype: torch.dtype = torch.float32, window: int = 0, **shape: int) -> Int8Case:
    plain = paged_case(**MIXED, window=window, dtype=dtype, **shape)  # type: ignore[arg-type]
    finite_N2GP = plain.kv_N2GPD.isfinite().all(-1)
    slot_U = finite_N2GP[:, 0, 0].flatten().nonzero()[:, 0]
    block_U, offset_U = slot_U // plain.kv_N2GPD.shape[3], slot_U % plain.kv_N2GPD.shape[3]
    k_UGD, v_UGD = (plain.kv_N2GPD[block_U, i, :, offset_U] for i in (0, 1))
    rounded = PagedCase(
        plain.q_THD,
        plain.kv_N2GPD,
        plain.batch,
        [dequantize(quantize(k_GLD)) for k_GLD in plain.k_GLD],
        [dequantize(quantize(v_GLD)) for v_GLD in plain.v_GLD],
    )
    return Int8Case(plain, rounded, k_UGD, v_UGD, slot_U)


def check(case: Int8Case, level: str = BEST, *, window: int = 0, softcap: float = 0.0) -> None:
    q_THD = case.plain.q_THD
    scale = q_THD.shape[2] ** -0.5
    with native.using(level, 2), poisoned_memory():
        got_THD = api.paged_attention(
            q_THD, case.written(), case.plain.batch, scale=scale, window=window, softcap=softcap
        )
    assert got_THD.dtype == q_THD.dtype and torch.isfinite(got_THD).all()
    own = case.rounded.dense(scale, window, softcap, torch.float64)
    # Against itself: queries and weights have 15 bits; the result is rounded to the dtype.
    rounding = 3e-4 + (0 if q_THD.dtype == torch.float32 else 5 * torch.finfo(q_THD.dtype).eps)
    assert (got_THD.double() - own).abs().max() < rounding
    # Against no rounding at all: half a step of K is 1 / 254 of its largest, 3 to 4 for normal numbers, and
    # moves a score by about as much; half a step of V moves the result.
    exact = case.plain.dense(scale, window, softcap, torch.float64)
    error = got_THD.double() - exact
    assert error.abs().max() < 0.15 and error.square().mean().sqrt() < 0.012 + rounding


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype, level: str) -> None:
    check(int8_case(dtype, head_dim=head_dim), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
def test_group_sizes(group: int, level: str) -> None:
    check(int8_case(head_dim=64, heads=2 * group), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_block_sizes(block_size: int, level: str) -> None:
    check(int8_case(torch.bfloat16, head_dim=64, block_size=block_size), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("window, softcap", [(1, 0.0), (20, 0.0), (64, 5.0), (0, 2.0), (1000, 30.0)])
def test_window_and_softcap(window: int, softcap: float, level: str) -> None:
    check(int8_case(window=window, head_dim=64), level, window=window, softcap=softcap)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_long_context_is_split_over_threads(threads: int) -> None:
    torch.manual_seed(0)
    length, blocks = 4099, 260
    kv = poisoned(blocks, 1, P, 64)
    k_TGD, v_TGD = torch.randn(2, length, 1, 64)
    order = torch.randperm(blocks - 1) + 1
    position_T = torch.arange(length)
    q_THD = torch.randn(1, 2, 64)
    batch = api.AttentionBatch(
        order[None].int(), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([length], dtype=torch.int32),
        1, 1, length,
    )  # fmt: skip
    with native.using(BEST, threads):
        api.write_kv(k_TGD, v_TGD, kv, order[position_T // P] * P + position_T % P)
        got = api.paged_attention(q_THD, kv, batch, scale=0.3)
    k_TD, v_TD = (dequantize(quantize(x))[:, 0].double() for x in (k_TGD, v_TGD))
    exact = (q_THD[0].double() @ k_TD.T * 0.3).softmax(-1) @ v_TD
    assert (got[0].double() - exact).abs().max() < 3e-4


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_what_is_written_is_within_half_a_step(head_dim: int, dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(1)
    rows_TGD = (torch.randn(40, 6, head_dim) * torch.logspace(-6, 4, 40)[:, None, None]).to(dtype)
    rows_TGD[3] = 0
    k_TGD, v_TGD = rows_TGD[:, :3], rows_TGD[:, 3:]  # slices of a wider tensor
    slot_T = torch.randperm(160)[:40] + 32
    slot_T[::5] = -1
    kv = poisoned(12, 3, 16, head_dim)
    with native.using(level):
        api.write_kv(k_TGD, v_TGD, kv, slot_T)
        stored = [dequantize(x) for x in gather(kv, torch.arange(12))]
    free_NP = torch.ones(12, 16, dtype=torch.bool)
    for token, slot in enumerate(slot_T.tolist()):
        if slot < 0:
            continue
        free_NP[slot // 16, slot % 16] = False
        for x_TGD, got in zip((k_TGD, v_TGD), stored, strict=True):
            row_GD = x_TGD[token].float()
            step_G1 = row_GD.abs().amax(-1, keepdim=True) / 127
            assert ((got[slot // 16, :, slot % 16] - row_GD).abs() <= step_G1 * 0.50001).all()
    assert all(got.transpose(1, 2)[free_NP].isnan().all() for got in stored), "a slot nobody wrote"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_a_row_that_is_not_finite_spoils_its_own_sequence_alone(part: int, bad: float, level: str) -> None:
    """The engine finds such requests by what they compute."""
    rows = torch.randn(2, 2, 1, 64)
    rows[part, 0, 0, 7] = bad
    kv = poisoned(3, 1, 16, 64)
    start = torch.tensor([0, 1, 2], dtype=torch.int32)
    batch = api.AttentionBatch(
        torch.tensor([[1], [2]], dtype=torch.int32), start, torch.ones(2, dtype=torch.int32), 2, 1, 1
    )
    with native.using(level):
        api.write_kv(rows[0], rows[1], kv, torch.tensor([16, 32]))
        out = api.paged_attention(torch.randn(2, 2, 64), kv, batch, scale=0.1)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_query_that_is_not_finite_shows(level: str) -> None:
    case = int8_case(head_dim=64)
    q_THD = case.plain.q_THD.clone()
    q_THD[0, 1, 5] = float("nan")
    with native.using(level):
        out = api.paged_attention(q_THD, case.written(), case.plain.batch, scale=0.1)
    assert out[0, 1].isnan().all() and out[1:].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_copied_block_has_its_factors(level: str) -> None:
    torch.manual_seed(2)
    kv = poisoned(5, 2, 16, 32)
    k_TGD, v_TGD = torch.randn(2, 21, 2, 32) * torch.logspace(-2, 2, 21)[:, None, None]
    with native.using(level):
        api.write_kv(k_TGD, v_TGD, kv, torch.arange(21) + 16)  # blocks 1 and 2
        api.copy_blocks(kv, torch.tensor([2]), torch.tensor([4]))
        start = torch.tensor([0, 1, 2], dtype=torch.int32)
        lengths = torch.tensor([21, 21], dtype=torch.int32)
        batch = api.AttentionBatch(
            torch.tensor([[1, 2], [1, 4]], dtype=torch.int32), start, lengths, 2, 1, 21
        )
        q_THD = torch.randn(1, 4, 32).repeat(2, 1, 1)
        both = api.paged_attention(q_THD, kv, batch, scale=0.2)
        assert torch.equal(both[0], both[1]) and both.isfinite().all()
        api.write_kv(k_TGD[:1], v_TGD[:1], kv, torch.tensor([4 * 16 + 4]))  # the copy goes its own way
        other = api.paged_attention(q_THD, kv, batch, scale=0.2)
        assert torch.equal(other[0], both[0]) and not torch.equal(other[1], both[1])


def test_large_scores_do_not_overflow() -> None:
    """The largest sums that int32 must hold: 256 products of the largest numbers of both sides."""
    kv = poisoned(3, 1, 16, 256)
    ones = torch.full((17, 1, 256), 1000.0)
    slots = torch.arange(17) + 16
    start, length = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([17], dtype=torch.int32)
    batch = api.AttentionBatch(torch.tensor([[1, 2]], dtype=torch.int32), start, length, 1, 1, 17)
    for level in LEVELS:
        with native.using(level):
            api.write_kv(ones, ones, kv, slots)
            out = api.paged_attention(torch.full((1, 1, 256), -1000.0), kv, batch, scale=1e-6)
        torch.testing.assert_close(out, torch.full((1, 1, 256), 1000.0))


def test_the_fallback_reads_what_the_reference_reads() -> None:
    """Shapes that the library does not take: row-major memory, whatever the level."""
    for head_dim, block_size in ((12, 16), (64, 4)):
        case = int8_case(head_dim=head_dim, block_size=block_size)
        want = reference.paged_attention(case.plain.q_THD, case.written(), case.plain.batch, scale=0.2)
        got = api.paged_attention(case.plain.q_THD, case.written(), case.plain.batch, scale=0.2)
        assert torch.equal(got, want)


def test_the_planner_counts_the_bytes_that_are_there() -> None:
    assert KV_FACTOR_BYTES == FACTOR_BYTES
