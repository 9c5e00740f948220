"""Paged attention: the reference against dense fp64, the Triton kernels against both."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels.paged_attention import reference
from tests.helpers.kernels import (
    PagedCase,
    assert_as_good,
    in_eight_bits,
    multiply_rows_alike,
    paged_case,
    poisoned_memory,
)

# Lengths around block borders; decodes first, then whole prompts and chunks over a cached prefix.
P = 16
MIXED = {
    "lengths": [1, P - 1, P, P + 1, 3 * P + 5, P, P + 1, 2 * P + 3],
    "query_lengths": [1, 1, 1, 1, 1, P, 5, P + 4],
}


def check(case: PagedCase, *, window: int = 0, softcap: float = 0.0, atol: float = 1e-6) -> None:
    from kernels.paged_attention import triton

    scale = case.q_THD.shape[2] ** -0.5
    exact = case.dense(scale, window, softcap, torch.float64)
    plain = case.dense(scale, window, softcap, case.q_THD.dtype)
    with poisoned_memory():
        got = triton.paged_attention(
            case.q_THD, case.kv_N2GPD, case.batch, scale=scale, window=window, softcap=softcap
        )
    assert_as_good(got, exact, plain, atol if case.q_THD.dtype == torch.float32 else max(atol, 1e-4))


def closeness(x: torch.Tensor) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-6} if x.dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits even these short contexts into parts."""
    from kernels.paged_attention import triton

    stock = triton.decode_config

    def config(*args: object) -> object:
        return dataclasses.replace(stock(*args), tile=16, min_chunk_tokens=16, target_programs=11)

    monkeypatch.setattr(triton, "decode_config", config)


@pytest.mark.parametrize("window", [0, 1, 7, P, 2 * P + 1])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_dense_attention(window: int, softcap: float, dtype: torch.dtype) -> None:
    case = paged_case(**MIXED, heads=6, groups=2, window=window, shared_blocks=1, dtype=dtype)
    exact, plain = (case.dense(0.2, window, softcap, d) for d in (torch.float64, dtype))
    with poisoned_memory():
        got = reference.paged_attention(
            case.q_THD, case.kv_N2GPD, case.batch, scale=0.2, window=window, softcap=softcap
        )
    assert_as_good(got, exact, plain)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
def test_every_group_size(device: str, small_parts: None, group: int) -> None:
    check(paged_case(**MIXED, heads=group, groups=1, device=device))


@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [
        (torch.float32, 16),
        (torch.float32, 128),
        (torch.float16, 64),
        (torch.bfloat16, 16),
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
    ],
)
def test_dtypes_and_block_sizes(device: str, dtype: torch.dtype, block_size: int) -> None:
    lengths = [1, block_size - 1, block_size + 1, 2 * block_size, 2 * block_size + 3]
    case = paged_case(
        lengths, [1, 1, 1, 19, 5], block_size=block_size, dtype=dtype, device=device, shared_blocks=1
    )
    check(case, atol=1e-5)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_head_dims(device: str, head_dim: int) -> None:
    case = paged_case([3, 40, 33], [1, 1, 20], heads=2, groups=1, head_dim=head_dim, device=device)
    check(case)


@pytest.mark.parametrize("window", [1, 7, P, P + 1, 2 * P + 1, 1000])
def test_sliding_windows(device: str, small_parts: None, window: int) -> None:
    check(paged_case(**MIXED, heads=2, groups=1, window=window, device=device), window=window)


@pytest.mark.parametrize("window", [0, 9])
def test_soft_cap(device: str, small_parts: None, window: int) -> None:
    case = paged_case(**MIXED, heads=2, groups=1, window=window, device=device)
    check(case, window=window, softcap=2.0, atol=3e-6)


@pytest.mark.parametrize("memory", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("head_dim", "block_size", "window"), [(32, 16, 0), (80, 64, 20), (128, 32, 0)])
def test_memory_in_8_bits(
    device: str, small_parts: None, memory: torch.dtype, head_dim: int, block_size: int, window: int
) -> None:
    case = paged_case(
        **MIXED, heads=4, groups=2, head_dim=head_dim, block_size=block_size, window=window,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    # What the memory holds has 8 bits; a weight times its value's factor is rounded to bf16 once more.
    check(in_eight_bits(case, memory), window=window, atol=4e-3)


@pytest.mark.parametrize("window", [0, 40])
def test_the_last_part_merges_as_a_second_kernel_would(
    device: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.paged_attention import triton

    stock = triton.decode_config
    case = paged_case([130, 1, 17, 60], [1] * 4, heads=3, groups=1, window=window, device=device)
    results = []
    for last_merges in (True, False):
        options = {"tile": 16, "min_chunk_tokens": 16, "target_programs": 40, "last_merges": last_merges}
        monkeypatch.setattr(
            triton, "decode_config", lambda *args, o=options: dataclasses.replace(stock(*args), **o)
        )
        case.batch.plans.clear()
        with poisoned_memory():
            for _ in range(2):  # the second time as the next layer, with counters that the first has left
                got = triton.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.2, window=window)
        results.append(got)
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


def test_a_step_is_planned_once(device: str, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.paged_attention import triton, triton_plan

    made = []
    stock = triton_plan._make_plan
    monkeypatch.setattr(triton_plan, "_make_plan", lambda *args: made.append(args) or stock(*args))
    case = paged_case([70, 20], [1, 1], heads=2, groups=1, device=device)
    for window in (0, 64, 0, 64):
        triton.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.2, window=window)
    assert len(made) == 2, "a plan for each window, whatever the number of layers"


def alone(case: PagedCase, s: int) -> PagedCase:
    """One sequence of a batch by itself, over the same memory."""
    batch = case.batch
    first, end = batch.query_start_S1[s : s + 2].tolist()
    length = batch.seq_len_S[s : s + 1]
    own = dataclasses.replace(
        batch,
        page_table_SB=batch.page_table_SB[s : s + 1],
        query_start_S1=torch.tensor([0, end - first], dtype=torch.int32, device=length.device),
        seq_len_S=length,
        num_decodes=int(s < batch.num_decodes),
        max_query_len=end - first,
        max_seq_len=int(length),
    )
    return PagedCase(case.q_THD[first:end], case.kv_N2GPD, own, [case.k_GLD[s]], [case.v_GLD[s]])


def test_deterministic_results_do_not_depend_on_the_batch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.paged_attention import triton, triton_config

    multiply_rows_alike(monkeypatch)
    monkeypatch.setattr(triton_config, "OWN_CHUNK_TOKENS", 64)
    triton_config.decode_config.cache_clear()
    case = paged_case(
        [400, 3, 210, 65, 70, 40], [1, 1, 1, 1, 40, 5], heads=4, groups=2, block_size=64,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    exact, plain = (case.dense(0.2, 0, 0.0, d) for d in (torch.float64, torch.bfloat16))
    together = triton.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.2, deterministic=True)
    assert_as_good(together, exact, plain, 1e-4)
    starts = case.batch.query_start_S1.tolist()
    for s in range(len(starts) - 1):
        own = alone(case, s)
        got = triton.paged_attention(own.q_THD, own.kv_N2GPD, own.batch, scale=0.2, deterministic=True)
        assert torch.equal(got, together[starts[s] : starts[s + 1]]), f"sequence {s}"
    triton_config.decode_config.cache_clear()


def test_deterministic_prompts_do_not_depend_on_their_chunks(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.paged_attention import triton

    multiply_rows_alike(monkeypatch)
    case = paged_case([150], [150], heads=4, groups=2, block_size=64, dtype=torch.bfloat16, device=device)
    whole = triton.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.2, deterministic=True)
    for begin, end in ((0, 37), (37, 100), (100, 101), (101, 150)):
        ends = torch.tensor([0, end - begin, end], dtype=torch.int32, device=device)
        batch = dataclasses.replace(
            case.batch,
            query_start_S1=ends[:2],
            seq_len_S=ends[2:],
            max_query_len=end - begin,
            max_seq_len=end,
        )
        got = triton.paged_attention(
            case.q_THD[begin:end], case.kv_N2GPD, batch, scale=0.2, deterministic=True
        )
        assert torch.equal(got, whole[begin:end]), f"tokens {begin} to {end}"


def test_decode_and_prefill_agree_bit_by_bit_within_a_part(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sums have one order where decode does not split, up to what threads and instructions do to it."""
    from kernels.paged_attention import triton

    if device == "cuda":
        pytest.skip("other instructions, other last bits")
    multiply_rows_alike(monkeypatch)
    case = paged_case([300], [1], heads=4, groups=2, block_size=64, dtype=torch.bfloat16, device=device)
    several = dataclasses.replace(case.batch, num_decodes=0)
    one, other = (
        triton.paged_attention(case.q_THD, case.kv_N2GPD, batch, scale=0.2, deterministic=True)
        for batch in (case.batch, several)
    )
    assert torch.equal(one, other)


def test_parts_of_unequal_contexts(device: str, small_parts: None) -> None:
    lengths = [300, 1, 17, 150, 5]
    check(paged_case(lengths, [1] * 5, heads=8, groups=2, block_size=32, device=device))


def test_more_parts_than_one_turn_of_the_merge(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.paged_attention import triton

    config = dataclasses.replace(
        triton.decode_config(32, torch.float32, torch.device(device)),
        tile=16,
        min_chunk_tokens=16,
        target_programs=100,
    )
    monkeypatch.setattr(triton, "decode_config", lambda *_: config)
    check(paged_case([400, 9], [1, 1], heads=2, groups=1, device=device))


def test_parts_of_the_stock_size(device: str) -> None:
    check(paged_case([1200, 30], [1, 1], block_size=64, dtype=torch.bfloat16, device=device), atol=1e-4)


def test_a_prompt_of_several_tiles(device: str) -> None:
    case = paged_case([20, 150, 97], [1, 110, 97], heads=4, groups=2, block_size=64, device=device)
    check(case)
    check(dataclasses.replace(case, batch=dataclasses.replace(case.batch, max_query_len=4096)))


def test_windows_over_several_tiles(device: str) -> None:
    case = paged_case(
        [310, 290],
        [1, 170],
        heads=2,
        groups=1,
        window=100,
        dtype=torch.bfloat16,
        block_size=64,
        device=device,
    )
    check(case, window=100, atol=1e-4)


def test_blocks_out_of_a_window_inside_a_tile(device: str) -> None:
    """Tiles of several blocks, of which the first ones have left the window."""
    case = paged_case(
        [60, 75], [1, 9], heads=2, groups=1, window=9, dtype=torch.bfloat16, block_size=16, device=device
    )
    check(case, window=9, atol=1e-4)


def test_many_sequences(device: str, small_parts: None) -> None:
    lengths = [1 + (7 * i) % 30 for i in range(70)]
    query_lengths = [1] * 66 + [min(3, n) for n in lengths[66:]]
    check(paged_case(lengths, query_lengths, heads=1, groups=1, device=device))


def test_padding_sequences_yield_zeros(device: str, small_parts: None) -> None:
    case = paged_case([0, 20, 0], [1, 1, 1], device=device)
    with poisoned_memory():
        from kernels.paged_attention import triton

        got = triton.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.2)
    want = reference.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.2)
    torch.testing.assert_close(got, want, **closeness(got))
    assert not got[0].any() and not got[2].any()


def test_queries_may_be_a_slice_of_a_wider_tensor(device: str) -> None:
    case = paged_case([20, 33], [1, 7], device=device)
    tokens, heads, dim = case.q_THD.shape
    wide = torch.randn(tokens, 2 * heads * dim, device=device).to(case.q_THD.dtype)
    q_THD = wide[:, heads * dim :].view(tokens, heads, dim)
    q_THD.copy_(case.q_THD)
    check(dataclasses.replace(case, q_THD=q_THD))


def test_where_blocks_lie_changes_no_bit(device: str, small_parts: None) -> None:
    from kernels.paged_attention import triton

    case = paged_case(**MIXED, device=device)
    blocks = case.kv_N2GPD.shape[0]
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).to(device)
    moved = torch.empty_like(case.kv_N2GPD)
    moved[order] = case.kv_N2GPD
    table_SB = order[case.batch.page_table_SB.long()].int()
    batch = dataclasses.replace(case.batch, page_table_SB=table_SB)
    before = triton.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.2)
    assert torch.equal(before, triton.paged_attention(case.q_THD, moved, batch, scale=0.2))


def test_token_by_token_equals_whole_prompt(device: str) -> None:
    from kernels.paged_attention import triton

    case = paged_case([40], [40], heads=2, groups=1, device=device)
    whole = triton.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.2)
    one = torch.tensor([0, 1], dtype=torch.int32, device=device)
    for position in (0, 15, 16, 39):
        length = torch.tensor([position + 1], dtype=torch.int32, device=device)
        batch = dataclasses.replace(
            case.batch, seq_len_S=length, query_start_S1=one, num_decodes=1, max_query_len=1
        )
        single = triton.paged_attention(case.q_THD[position : position + 1], case.kv_N2GPD, batch, scale=0.2)
        torch.testing.assert_close(single[0], whole[position], **closeness(whole))


@pytest.mark.gpu
def test_block_offsets_past_32_bits() -> None:
    """Block ids whose element offset passes 2^31."""
    from kernels.paged_attention import triton

    head_dim, groups, block_size = 128, 8, 64
    blocks = 2**31 // (2 * groups * block_size * head_dim) + 16
    kv_N2GPD = torch.empty((blocks, 2, groups, block_size, head_dim), dtype=torch.bfloat16, device="cuda")
    case = paged_case(
        [100, 90], [1, 30], heads=8, groups=groups, head_dim=head_dim, block_size=block_size,
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    shift = blocks - case.kv_N2GPD.shape[0]
    kv_N2GPD[shift:] = case.kv_N2GPD
    batch = dataclasses.replace(case.batch, page_table_SB=case.batch.page_table_SB + shift)
    near = triton.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.1)
    far = triton.paged_attention(case.q_THD, kv_N2GPD, batch, scale=0.1)
    assert torch.equal(near, far)


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths() -> None:
    """The launch depends on host bounds alone, so a replay with other lengths is right."""
    from kernels.paged_attention import triton

    case = paged_case(
        [1500, 700, 64], [1, 1, 1], block_size=64, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    lengths_S = case.batch.seq_len_S.clone()
    batch = dataclasses.replace(case.batch, seq_len_S=lengths_S)
    lengths_S.fill_(1)
    triton.paged_attention(case.q_THD, case.kv_N2GPD, batch, scale=0.1)
    batch.plans.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_THD = triton.paged_attention(case.q_THD, case.kv_N2GPD, batch, scale=0.1)
    lengths_S.copy_(case.batch.seq_len_S)
    graph.replay()
    want = reference.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.1)
    torch.testing.assert_close(out_THD, want, rtol=2e-2, atol=2e-2)
