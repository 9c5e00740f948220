"""Other attention kernels over the same shapes. Each is tried where it is installed; what fails says why.

- `sdpa`: torch's `scaled_dot_product_attention`, on contiguous keys and values: no paging to pay for.
- `flex`: torch's `flex_attention`, compiled, contiguous as well. Compiling takes long, so few shapes get it.
- `flashinfer`: its paged decode and prefill over our memory as it is (its layout "HND").
- `fa3`: FlashAttention 3, paged, over a view of our memory: the library of a vLLM wheel where its file is
  given, else the module `flash_attn_interface`.

One that has failed is not tried again but for lack of memory: its next try may take as long.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.timing import Call, Lab
from kernels.types import AttentionBatch

Outcome = float | str


def outcomes(
    lab: Lab,
    q_THD: Tensor,
    memory: Sequence[Tensor],
    batch: AttentionBatch,
    *,
    uniform: bool,
    with_flex: bool,
) -> Iterator[tuple[str, Outcome]]:
    """(name, microseconds or why not) of each rival that has something to say on this shape."""
    queries, context = batch.max_query_len, batch.max_seq_len
    whole = queries in (1, context)  # chunks over a prefix: torch has no fast path for their mask
    if uniform and whole:
        yield "sdpa", _tried(lab, "sdpa", _contiguous(lab, _sdpa, q_THD, memory, batch))
        if with_flex:
            yield "flex", _tried(lab, "flex", _contiguous(lab, _flex, q_THD, memory, batch))
    if _installed("flashinfer"):
        yield (
            "flashinfer",
            _tried(lab, "flashinfer", functools.partial(_flashinfer, lab, q_THD, memory, batch)),
        )
    if lab.fa3:
        yield "fa3", _tried(lab, "fa3", functools.partial(_vllm_fa3, lab, q_THD, memory, batch))
    elif _installed("flash_attn_interface"):
        yield "fa3", _tried(lab, "fa3", functools.partial(_fa3, q_THD, memory, batch))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


_failed: dict[str, str] = {}


def _tried(lab: Lab, name: str, make: Callable[[], list[Call]]) -> Outcome:
    """Microseconds, or why there are none. Whatever a rival does wrong, our own figures must come out."""
    if name in _failed:
        return _failed[name]
    try:
        return lab.time_us(make())
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "not enough memory"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        _failed[name] = f"failed before: {said}"
        return said


def _contiguous(
    lab: Lab, attend: Callable[..., Any], q_THD: Tensor, memory: Sequence[Tensor], batch: AttentionBatch
) -> Callable[[], list[Call]]:
    """Calls over contiguous keys and values of as many layers."""

    def make() -> list[Call]:
        sequences, queries = batch.seq_len_S.shape[0], batch.max_query_len
        groups, head_dim = memory[0].shape[2], q_THD.shape[2]
        q = q_THD.view(sequences, queries, -1, head_dim).transpose(1, 2).contiguous()
        shape = (sequences, groups, batch.max_seq_len, head_dim)
        return [functools.partial(attend, q, lab.random(*shape), lab.random(*shape)) for _ in memory]

    return make


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return _compiled_flex()(q, k, v, block_mask=_causal(q.shape[2], str(q.device)), enable_gqa=True)


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention)


@functools.cache
def _causal(queries: int, device: str) -> Any:
    if queries == 1:
        return None
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    return flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, queries, queries, device=device)


def _flashinfer(lab: Lab, q_THD: Tensor, memory: Sequence[Tensor], batch: AttentionBatch) -> list[Call]:
    flashinfer = importlib.import_module("flashinfer")
    groups, block_size, head_dim = memory[0].shape[2:]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=lab.device)
    blocks_S = (batch.seq_len_S + block_size - 1) // block_size
    starts_S1 = F.pad(blocks_S.cumsum(0), (1, 0)).int()
    tables = zip(batch.page_table_SB, blocks_S.tolist(), strict=True)
    used = torch.cat([table_B[:count] for table_B, count in tables])
    cut = (starts_S1, used, (batch.seq_len_S - 1) % block_size + 1)
    sizes = (q_THD.shape[1], groups, head_dim, block_size)
    dtypes = {"q_data_type": q_THD.dtype, "kv_data_type": q_THD.dtype}
    if batch.max_query_len == 1:
        # Several query heads of one kv head: its documentation asks for tensor cores then.
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, kv_layout="HND", use_tensor_cores=q_THD.shape[1] // groups >= 4
        )
        wrapper.plan(*cut, *sizes, **dtypes)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout="HND")
        wrapper.plan(batch.query_start_S1, *cut, *sizes, causal=True, **dtypes)
    return [functools.partial(wrapper.run, q_THD, kv_N2GPD) for kv_N2GPD in memory]


def _fa3(q_THD: Tensor, memory: Sequence[Tensor], batch: AttentionBatch) -> list[Call]:
    attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    q = q_THD.view(batch.seq_len_S.shape[0], batch.max_query_len, *q_THD.shape[1:])
    return [
        functools.partial(
            attend, q, *kv_N2GPD.transpose(2, 3).unbind(1),
            cache_seqlens=batch.seq_len_S, page_table=batch.page_table_SB, causal=True,
        )
        for kv_N2GPD in memory
    ]  # fmt: skip


def _vllm_fa3(lab: Lab, q_THD: Tensor, memory: Sequence[Tensor], batch: AttentionBatch) -> list[Call]:
    """By position, as the library's schema in vLLM 0.21 to 0.24 has them; another one is refused by torch."""
    torch.ops.load_library(lab.fa3)
    attend, out_THD = torch.ops._vllm_fa3_C.fwd, torch.empty_like(q_THD)
    no_new, no_rotation_or_factors = (None,) * 3, (None,) * 8
    lengths = (
        batch.query_start_S1,
        None,
        None,
        None,
        batch.seq_len_S,
        batch.max_query_len,
        batch.max_seq_len,
    )
    causal = (q_THD.shape[2] ** -0.5, True, -1, -1, 0.0, True)
    schedule = (None, 0, None, 0, None, 1, 0, None)  # chooses its own splits
    return [
        functools.partial(
            attend, q_THD, *kv_N2GPD.transpose(2, 3).unbind(1), *no_new, out_THD, *lengths,
            batch.page_table_SB, *no_rotation_or_factors, *causal, *schedule,
        )
        for kv_N2GPD in memory
    ]  # fmt: skip
