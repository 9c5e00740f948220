"""What the kernel tests share: paged cases with poison around the data, a dense fp64 oracle, tolerances.

Also mends Triton's interpreter, which multiplies bf16 operands as the integers that hold them, truncates
where hardware rounds to nearest, and rounds fp8 wrongly.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.kv_format import FACTOR_BYTES, dequantize, head_dim_of, kv_width, quantize
from kernels.types import AttentionBatch, SampleParams

NAN = float("nan")


@dataclass(frozen=True)
class PagedCase:
    """One batch, twice: as paged memory, NaN wherever no key or value belongs, and as dense tensors."""

    q_THD: Tensor
    kv_N2GPD: Tensor
    batch: AttentionBatch
    k_GLD: list[Tensor]
    v_GLD: list[Tensor]

    def dense(self, scale: float, window: int, softcap: float, dtype: torch.dtype) -> Tensor:
        """Attention token by token over contiguous keys, computed in `dtype`."""
        out_THD = torch.zeros(self.q_THD.shape, dtype=dtype, device=self.q_THD.device)
        starts = self.batch.query_start_S1.tolist()
        for s, length in enumerate(self.batch.seq_len_S.tolist()):
            k_GLD, v_GLD = self.k_GLD[s].to(dtype), self.v_GLD[s].to(dtype)
            for token in range(starts[s], starts[s + 1]):
                end = length - (starts[s + 1] - token) + 1
                begin = max(0, end - window) if window else 0
                if end <= 0:
                    continue
                q_GCD = self.q_THD[token].to(dtype).view(k_GLD.shape[0], -1, k_GLD.shape[2])
                score_GCL = (q_GCD @ k_GLD[:, begin:end].transpose(1, 2)) * scale
                if softcap:
                    score_GCL = softcap * torch.tanh(score_GCL / softcap)
                out_GCD = score_GCL.softmax(-1) @ v_GLD[:, begin:end]
                out_THD[token] = out_GCD.flatten(0, 1)
        return out_THD


def paged_case(
    lengths: Sequence[int],
    query_lengths: Sequence[int],
    *,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    window: int = 0,
    shared_blocks: int = 0,
    seed: int = 0,
) -> PagedCase:
    """Builds a batch; the first sequences with one query token are its decodes.

    The blocks of all sequences are shuffled among free ones. Every slot that holds no visible token is NaN:
    free blocks, tails of last blocks, and with a window the blocks that have slid out of it. Unused table
    entries name a block of NaN. The first `shared_blocks` blocks of long enough sequences are the same.

    The dtype is fp32 unless said, to show the smallest slips; on a GPU bf16, which compiles twice as fast.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    random = torch.Generator().manual_seed(seed)
    per_sequence = [-(-length // block_size) for length in lengths]
    blocks = sum(per_sequence) + 5
    kv_N2GPD = torch.full((blocks, 2, groups, block_size, head_dim), NAN)
    free = (torch.randperm(blocks - 2, generator=random) + 1).tolist()
    poison = blocks - 1
    table_SB = torch.full((len(lengths), max(per_sequence) + 3), poison, dtype=torch.int32)
    common = [free.pop() for _ in range(shared_blocks)]
    for block in common:
        kv_N2GPD[block] = torch.randn(kv_N2GPD.shape[1:], generator=random)
    k_GLD, v_GLD = [], []
    for s, (length, query_length) in enumerate(zip(lengths, query_lengths, strict=True)):
        dead = max(0, length - query_length - window + 1) // block_size if window else 0
        ids = []
        for b in range(per_sequence[s]):
            shared = b < shared_blocks and (b + 1) * block_size <= length
            ids.append(common[b] if shared else free.pop())
            used = min(block_size, length - b * block_size)
            if not shared:
                kv_N2GPD[ids[b], :, :, :used] = torch.randn(2, groups, used, head_dim, generator=random)
        dense_2GLD = kv_N2GPD[ids].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].clone()
        k_GLD.append(dense_2GLD[0].to(dtype).to(device))
        v_GLD.append(dense_2GLD[1].to(dtype).to(device))
        table_SB[s, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        table_SB[s, :dead] = poison
    q_THD = torch.randn(sum(query_lengths), heads, head_dim, generator=random)
    decodes = next((s for s, n in enumerate(query_lengths) if n != 1), len(lengths))
    batch = AttentionBatch(
        page_table_SB=table_SB.to(device),
        query_start_S1=torch.tensor([0, *query_lengths]).cumsum(0).int().to(device),
        seq_len_S=torch.tensor(lengths, dtype=torch.int32, device=device),
        num_decodes=decodes,
        max_query_len=max(query_lengths),
        max_seq_len=max(lengths),
    )
    return PagedCase(q_THD.to(dtype).to(device), kv_N2GPD.to(dtype).to(device), batch, k_GLD, v_GLD)


def slab_rows(kv_N2GPD: Tensor) -> Tensor:
    """Rows of D + 4 bytes, as `kv_format.quantize` makes them, of slabs whose factors are at their end."""
    n, two, g, p, _ = kv_N2GPD.shape
    d = head_dim_of(kv_N2GPD)
    slab_N2GX = kv_N2GPD.view(torch.int8).reshape(n, two, g, -1)
    values = slab_N2GX[..., : p * d].reshape(n, two, g, p, d)
    factors = slab_N2GX[..., p * d :].reshape(n, two, g, p, FACTOR_BYTES)
    return torch.cat((values, factors), -1).view(kv_N2GPD.dtype)


def in_eight_bits(case: PagedCase, memory: torch.dtype) -> PagedCase:
    """The case with memory as the Triton kernels keep it in 8 bits, and dense tensors of what that holds.

    Slots that hold no token have a factor of NaN, and so poison whatever reads them.
    """
    rows_N2GPW = quantize(case.kv_N2GPD, memory).view(torch.int8)
    n, two, g, p, d = case.kv_N2GPD.shape
    values, factors = rows_N2GPW[..., :d], rows_N2GPW[..., d:]
    slab = torch.cat((values.reshape(n, two, g, -1), factors.reshape(n, two, g, -1)), -1)
    kv_N2GPD = slab.view(n, two, g, p, kv_width(d, memory)).view(memory)

    def rounded(x_GLD: Tensor) -> Tensor:
        return dequantize(quantize(x_GLD, memory)).to(case.q_THD.dtype)

    return PagedCase(
        case.q_THD, kv_N2GPD, case.batch, [rounded(k) for k in case.k_GLD], [rounded(v) for v in case.v_GLD]
    )


def assert_as_good(got: Tensor, exact: Tensor, plain: Tensor, atol: float = 1e-6) -> None:
    """Fails unless `got` is at most twice as far from the fp64 result as plain torch in the same dtype."""
    assert torch.isfinite(got).all(), "a value that was never written, or came from poisoned memory"
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + atol
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes torch.empty hand out NaN (integers: their largest), so that an unwritten result shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def sample_params(
    rows: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
    position: int | Sequence[int] = 0,
    device: str = "cpu",
) -> SampleParams:
    """Builds the bundle; a scalar goes to every row."""

    def column(value: float | Sequence[float], dtype: torch.dtype) -> Tensor:
        values = value if isinstance(value, Sequence) else [value] * rows
        return torch.tensor(values, dtype=dtype, device=device)

    params = {
        "temperature_S": column(temperature, torch.float32),
        "top_k_S": column(top_k, torch.int32),
        "top_p_S": column(top_p, torch.float32),
        "min_p_S": column(min_p, torch.float32),
    }
    filters = (params["top_k_S"] > 0) | (params["top_p_S"] < 1) | (params["min_p_S"] > 0)
    return SampleParams(
        **params,
        seed_S=column(seed, torch.int64),
        position_S=column(position, torch.int64),
        all_greedy=not bool((params["temperature_S"] > 0).any()),
        any_filter=bool(filters.any()),
    )


def mend_interpreter() -> None:
    """Gives Triton's interpreter bf16 products and round-to-nearest casts to bf16 and fp8."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widen(data: np.ndarray) -> np.ndarray:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def narrow(data: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)

    def as_fp8(data: np.ndarray) -> np.ndarray:
        return torch.from_numpy(data.astype(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def from_fp8(data: np.ndarray) -> np.ndarray:
        return torch.from_numpy(data.copy()).view(torch.float8_e4m3fn).float().numpy()

    stock_cast, stock_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    stock_fp_to_fp = InterpreterBuilder.create_fp_to_fp
    if getattr(stock_cast, "mended", False):
        return

    def cast_impl(self, src, dst_type):  # type: ignore[no-untyped-def]
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(widen(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(narrow(src.data), target)
        return stock_cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(widen(x.data), tl.float32) for x in (a, b))
        return stock_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):  # type: ignore[no-untyped-def]
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.float8e4nv):
            return TensorHandle(as_fp8(src.data), target)
        if (source, target) == (tl.float8e4nv, tl.float32):
            return TensorHandle(from_fp8(src.data), target)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    cast_impl.mended = True  # type: ignore[attr-defined]
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


def multiply_rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter's products of a row the same bits wherever in a tile it lies, as hardware's are.

    numpy's are not: BLAS sums the rows at a tile's edge in another order.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *_how):  # type: ignore[no-untyped-def]
        x, y = (
            (self.cast_impl(side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side).data
            for side in (a, b)
        )
        return TensorHandle(np.einsum("mk,kn->mn", x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
