"""The CPU backend's KV ops against their references: every instruction set, thread count, dtype and shape.

Each case writes sequences through `write_kv` into two KV tensors filled with NaN, the reference's and the
backend's, so free blocks and the unused tails of last blocks hold NaN whenever attention reads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.copy_blocks.cpu import copy_blocks
from kernels.native import library as native
from kernels.paged_attention import reference
from kernels.paged_attention.cpu import paged_attention
from kernels.types import AttentionBatch
from kernels.write_kv import reference as write_reference
from kernels.write_kv.cpu import write_kv
from tests.helpers.native_kv import gather

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = [*native.levels(), "torch"]
BEST = LEVELS[-2] if len(LEVELS) > 1 else "torch"
# Contexts around block borders, a decode row each; then whole prompts and a chunk over a cached prefix.
MIXED = [(1, 1), (15, 1), (16, 1), (17, 1), (63, 1), (65, 1), (130, 1), (33, 33), (1, 1), (150, 70), (129, 2)]


@dataclass(frozen=True)
class Case:
    """A batch of `(context, query)` lengths on heads H over kv heads G."""

    dtype: torch.dtype = torch.float32
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    block: int = 16
    lengths: tuple[tuple[int, int], ...] = tuple(MIXED)
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True)
class Inputs:
    """What a case gives every backend, on a permuted page table, and the exact result."""

    q_THD: Tensor
    k_UGD: Tensor
    v_UGD: Tensor
    slot_U: Tensor
    expected_kv: Tensor
    batch: AttentionBatch
    exact_THD: Tensor

    def written(self) -> Tensor:
        """Returns the backend's KV memory: NaN but for what `write_kv` put there."""
        kv = torch.full_like(self.expected_kv, float("nan"))
        write_kv(self.k_UGD, self.v_UGD, kv, self.slot_U)
        return kv


@functools.cache  # the same for every instruction set
def inputs(case: Case) -> Inputs:
    torch.manual_seed(0)
    contexts = [context for context, _ in case.lengths]
    blocks = [-(-context // case.block) for context in contexts]
    ids = torch.randperm(sum(blocks) + 4) + 1
    # Entries past a sequence's blocks would crash whoever read them.
    page_table_SB = torch.full((len(contexts), max(blocks) + 1), 2**30, dtype=torch.int32)
    slots = []
    for s, context in enumerate(contexts):
        page_table_SB[s, : blocks[s]], ids = ids[: blocks[s]], ids[blocks[s] :]
        position_T = torch.arange(context)
        slots.append(page_table_SB[s].long()[position_T // case.block] * case.block + position_T % case.block)
    slot_U = torch.cat(slots)
    k_UGD, v_UGD = torch.randn(2, len(slot_U), case.kv_heads, case.dim).to(case.dtype)
    shape = (sum(blocks) + 5, 2, case.kv_heads, case.block, case.dim)
    expected_kv = torch.full(shape, float("nan"), dtype=case.dtype)
    write_reference.write_kv(k_UGD, v_UGD, expected_kv, slot_U)
    queries = torch.tensor([0] + [query for _, query in case.lengths])
    q_THD = torch.randn(int(queries.sum()), case.heads, case.dim).to(case.dtype)
    batch = AttentionBatch(
        page_table_SB=page_table_SB,
        query_start_S1=queries.cumsum(0).int(),
        seq_len_S=torch.tensor(contexts, dtype=torch.int32),
        num_decodes=0,
        max_query_len=int(queries.max()),
        max_seq_len=max(contexts),
    )
    exact_THD = reference.paged_attention(
        q_THD.float(),
        expected_kv.float(),
        batch,
        scale=case.dim**-0.5,
        window=case.window,
        softcap=case.softcap,
    )
    return Inputs(q_THD, k_UGD, v_UGD, slot_U, expected_kv, batch, exact_THD)


def check(case: Case, level: str = BEST, threads: int = 2) -> None:
    """Compares with fp32; the error may be twice that of rounding what goes in and comes out to the dtype."""
    given = inputs(case)
    with native.using(level, threads):
        got_THD = paged_attention(
            given.q_THD,
            given.written(),
            given.batch,
            scale=case.dim**-0.5,
            window=case.window,
            softcap=case.softcap,
        )
    assert got_THD.dtype == case.dtype and got_THD.is_contiguous()
    epsilon = torch.finfo(case.dtype).eps
    # Values are standard normal: their weighted means, and so the errors of a rounding, stay below 5 epsilon.
    torch.testing.assert_close(got_THD.float(), given.exact_THD, rtol=epsilon, atol=max(3 * epsilon, 4e-6))


def build(case: Case) -> tuple[Tensor, Tensor, AttentionBatch]:
    """Returns q, the KV memory and the batch, for the tests that go on from there."""
    given = inputs(case)
    return given.q_THD, given.written(), given.batch


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 32, 64, 72, 80, 96, 128, 256])
def test_head_dims(dim: int, dtype: torch.dtype, level: str) -> None:
    check(Case(dtype=dtype, dim=dim), level, 1 + dim % 3 % 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [16, 32, 48, 64, 128])
def test_block_sizes(block: int, dtype: torch.dtype, level: str) -> None:
    check(Case(dtype=dtype, block=block), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
def test_group_sizes(group: int, dtype: torch.dtype, level: str) -> None:
    check(Case(dtype=dtype, heads=2 * group), level)


@pytest.mark.parametrize("heads", [49, 100])
def test_groups_larger_than_a_tile(heads: int) -> None:
    check(Case(heads=heads, kv_heads=1, lengths=((70, 1), (20, 20))))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window, softcap", [(1, 0.0), (20, 0.0), (64, 5.0), (0, 2.0), (1000, 30.0)])
def test_window_and_softcap(window: int, softcap: float, dtype: torch.dtype, level: str) -> None:
    check(Case(dtype=dtype, window=window, softcap=softcap), level)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("window", [0, 1500])
def test_a_long_context_is_split_over_threads(dtype: torch.dtype, threads: int, window: int) -> None:
    check(Case(dtype=dtype, heads=2, kv_heads=1, lengths=((4099, 1),), window=window), threads=threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_up_to_two_blocks(dtype: torch.dtype) -> None:
    check(Case(dtype=dtype, lengths=tuple((n, 1) for n in range(1, 34))))
    check(Case(dtype=dtype, lengths=tuple((n, n) for n in range(1, 34))))


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 40, 700])
def test_a_query_has_the_same_bits_alone_in_a_chunk_and_in_a_batch(
    window: int, dtype: torch.dtype, level: str
) -> None:
    """A result depends on the query's keys alone, not on tiles, chunks, threads or other sequences."""
    lengths = ((1300, 1), (1600, 1200), (70, 70))
    q_THD, kv, batch = build(Case(dtype=dtype, lengths=lengths))

    def attend(sequence: int, queries: int, threads: int) -> Tensor:
        """The last queries of a sequence, alone."""
        end = int(batch.query_start_S1[sequence + 1])
        table_SB, seq_len_S = (x[sequence : sequence + 1] for x in (batch.page_table_SB, batch.seq_len_S))
        start = torch.tensor([0, queries], dtype=torch.int32)
        alone = AttentionBatch(table_SB, start, seq_len_S, 0, queries, batch.max_seq_len)
        with native.using(level, threads):
            return paged_attention(q_THD[end - queries : end], kv, alone, scale=0.2, window=window)

    with native.using(level, 1):
        whole_THD = paged_attention(q_THD, kv, batch, scale=0.2, window=window)
    for threads in (1, 3):
        assert torch.equal(attend(0, 1, threads), whole_THD[:1])
        assert torch.equal(attend(1, 1, threads), whole_THD[1200:1201])
        assert torch.equal(attend(1, 137, threads), whole_THD[1064:1201])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_written_blocks_read_back_and_skipped_slots_stay(dtype: torch.dtype, level: str) -> None:
    with native.using(level):
        k_TGD, v_TGD = torch.randn(2, 40, 3, 24).to(dtype)
        slot_T = (torch.randperm(160)[:40] + 32).long()
        slot_T[::5] = -1
        expected_kv = torch.full((12, 2, 3, 16, 24), float("nan"), dtype=dtype)
        kv = expected_kv.clone()
        write_reference.write_kv(k_TGD, v_TGD, expected_kv, slot_T)
        write_kv(k_TGD, v_TGD, kv, slot_T)
        for got, expected in zip(gather(kv, torch.arange(12)), expected_kv.unbind(1), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_are_written_by_several_threads(dtype: torch.dtype) -> None:
    expected_kv = torch.zeros(70, 2, 2, 16, 64, dtype=dtype)
    kv = expected_kv.clone()
    k_TGD, v_TGD = torch.randn(2, 1101, 2, 64).to(dtype)
    slot_T = torch.arange(1101) + 3
    with native.using(threads=2):
        write_kv(k_TGD, v_TGD, kv, slot_T)
        write_reference.write_kv(k_TGD, v_TGD, expected_kv, slot_T)
        for got, expected in zip(gather(kv, torch.arange(70)), expected_kv.unbind(1), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_slices_of_a_fused_projection(level: str) -> None:
    """q, k and v may be views of one `[T, (H + 2G) * D]` tensor."""
    with native.using(level):
        q_THD, kv, batch = build(Case(dtype=torch.bfloat16))
        fused = torch.randn(q_THD.shape[0], 8, 32).bfloat16()
        q, k, v = fused.split([4, 2, 2], dim=1)
        got = paged_attention(q, kv, batch, scale=0.2)
        torch.testing.assert_close(got, paged_attention(q.contiguous(), kv, batch, scale=0.2), rtol=0, atol=0)
        slot_T = torch.arange(len(q_THD))
        other = kv.clone()
        write_kv(k, v, kv, slot_T)
        write_kv(k.contiguous(), v.contiguous(), other, slot_T)
        torch.testing.assert_close(kv, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", [BEST, "torch"])
def test_copied_and_shared_blocks(level: str) -> None:
    """Two sequences share a prefix block; the copy of a partly filled block can be continued."""
    with native.using(level):
        q_THD, kv, batch = build(Case(dtype=torch.bfloat16, lengths=((21, 1),)))
        first, second = batch.page_table_SB[0, :2].tolist()
        free = next(b for b in range(1, kv.shape[0]) if b not in (first, second))
        copy_blocks(kv, torch.tensor([second]), torch.tensor([free]))
        table_SB = torch.tensor([[first, second], [first, free]], dtype=torch.int32)
        start_S1, length_S = (
            torch.tensor([0, 1, 2], dtype=torch.int32),
            torch.tensor([21, 21], dtype=torch.int32),
        )
        both = AttentionBatch(table_SB, start_S1, length_S, 2, 1, 21)
        out = paged_attention(q_THD.repeat(2, 1, 1), kv, both, scale=0.2)
        assert torch.equal(out[0], out[1]) and not out.isnan().any()
        k_TGD, v_TGD = torch.randn(2, 1, 2, 32).bfloat16()
        write_kv(k_TGD, v_TGD, kv, torch.tensor([free * 16 + 5]))
        again = paged_attention(q_THD.repeat(2, 1, 1), kv, both, scale=0.2)
        assert torch.equal(again, out), "a token past the end of a sequence is not read"


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_no_sequence_and_of_empty_ones_are_zero(level: str) -> None:
    with native.using(level):
        q_THD, kv, batch = build(Case(lengths=((20, 1),)))
        table_SB = batch.page_table_SB.repeat(2, 1)
        lengths = torch.tensor([0, 20], dtype=torch.int32)
        batch = AttentionBatch(table_SB, torch.tensor([0, 1, 2], dtype=torch.int32), lengths, 2, 1, 20)
        out = paged_attention(q_THD.repeat(5, 1, 1), kv, batch, scale=0.2)
        assert not out[0].any() and out[1].any() and not out[2:].any()


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype, level: str) -> None:
    with native.using(level):
        given = inputs(Case(dtype=dtype))
        got = paged_attention(given.q_THD * 100, given.written(), given.batch, scale=10.0)
    exact = reference.paged_attention(
        (given.q_THD * 100).float(), given.expected_kv.float(), given.batch, scale=10.0
    )
    # Scores of thousands: which key wins is decided by their last bits, so only most rows must agree.
    assert got.isfinite().all()
    assert ((got.float() - exact).abs().amax(-1) < 0.05).float().mean() > 0.9


def test_blocks_the_library_does_not_take_go_to_torch() -> None:
    check(Case(block=4))
    check(Case(block=8, dim=12, dtype=torch.bfloat16))
    check(Case(dim=264, lengths=((20, 1), (5, 5))))


def test_describe_names_what_runs() -> None:
    with native.using("torch"):
        assert native.describe().startswith("torch fallback")
    if native.levels():
        with native.using(native.levels()[0], 3):
            assert native.describe() == "native (generic, 3 threads; bf16 weights as 12-bit integers)"


@pytest.mark.skipif(not native.levels(), reason="needs the native library")
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_sources_digest", lambda folder: b"what was changed since")
    assert native._load() == (None, "library built from other sources (run `make install`)")
