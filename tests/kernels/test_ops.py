"""The small ops: each reference against fp64 or plain Python, each Triton kernel against its reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.copy_blocks import reference as copy_reference
from kernels.logprobs import reference as logprobs_reference
from kernels.mask_tokens import reference as mask_tokens_reference
from kernels.penalize import reference as penalize_reference
from kernels.rms_norm import reference as norm_reference
from kernels.rotary import reference as rotary_reference
from kernels.silu_mul import reference as silu_reference
from kernels.types import PenaltyParams
from kernels.write_kv import reference as write_reference
from tests.helpers.kernels import NAN, assert_as_good, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def backends(op: str, reference: object, device: str) -> list[object]:
    from importlib import import_module

    return [reference, import_module(f"kernels.{op}.triton")]


# write_kv and copy_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "head_dim", "block_size"), [(2, 32, 16), (3, 80, 48), (1, 256, 128)])
def test_write_kv(device: str, dtype: torch.dtype, groups: int, head_dim: int, block_size: int) -> None:
    slots = [0, 5, -1, 2 * block_size + 1, 3 * block_size - 1, -1]
    wide = randn(len(slots), 3 * groups * head_dim, dtype=dtype, device=device)
    k_TGD, _, v_TGD = wide.view(len(slots), 3, groups, head_dim).unbind(1)
    for backend in backends("write_kv", write_reference, device):
        kv_N2GPD = torch.full((4, 2, groups, block_size, head_dim), NAN, dtype=dtype, device=device)
        backend.write_kv(k_TGD, v_TGD, kv_N2GPD, torch.tensor(slots, device=device))
        for token, slot in enumerate(slots):
            if slot >= 0:
                block, offset = divmod(slot, block_size)
                assert torch.equal(kv_N2GPD[block, 0, :, offset], k_TGD[token])
                assert torch.equal(kv_N2GPD[block, 1, :, offset], v_TGD[token])
        assert int(kv_N2GPD.isfinite().sum()) == 4 * 2 * groups * head_dim


def test_copy_blocks(device: str) -> None:
    kv_N2GPD = randn(6, 2, 3, 16, 33, device=device)
    before = kv_N2GPD.clone()
    src_, dst_ = torch.tensor([1, 1, 5], device=device), torch.tensor([0, 3, 2], device=device)
    for backend in backends("copy_blocks", copy_reference, device):
        kv_N2GPD.copy_(before)
        backend.copy_blocks(kv_N2GPD, src_, dst_)
        assert torch.equal(kv_N2GPD, before[[1, 1, 5, 1, 4, 5]])


# rms_norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (20, 80), (1, 5000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(device: str, dtype: torch.dtype, rows: int, width: int, offset: float) -> None:
    x_TE, weight_E = (
        randn(rows, width, dtype=dtype, device=device),
        randn(width, dtype=dtype, seed=1, device=device),
    )

    def plain(dtype: torch.dtype) -> Tensor:
        x, weight = x_TE.to(dtype), weight_E.to(dtype) + offset
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    for backend in backends("rms_norm", norm_reference, device):
        with poisoned_memory():
            got = backend.rms_norm(x_TE, weight_E, 1e-5, offset=offset)
        assert got.dtype == dtype
        assert_as_good(got, plain(torch.float64), plain(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_a_residual_sum_changes_no_bit(device: str, dtype: torch.dtype) -> None:
    x_TE, residual_TE = (
        randn(5, 96, dtype=dtype, device=device),
        randn(5, 96, dtype=dtype, device=device, seed=2),
    )
    weight_E = randn(96, dtype=dtype, device=device, seed=3)
    total_TE = residual_TE + x_TE
    for backend in backends("rms_norm", norm_reference, device):
        stream_TE = residual_TE.clone()
        fused = backend.rms_norm(x_TE, weight_E, 1e-6, residual_TE=stream_TE)
        assert torch.equal(stream_TE, total_TE)
        assert torch.equal(fused, backend.rms_norm(total_TE, weight_E, 1e-6))


def test_rms_norm_of_heads_in_a_wider_tensor(device: str) -> None:
    x_THD = randn(4, 10, 16, device=device)[:, 2:8]
    weight_D = randn(16, device=device, seed=1)
    for backend in backends("rms_norm", norm_reference, device):
        got = backend.rms_norm(x_THD, weight_D, 1e-6)
        want = norm_reference.rms_norm(x_THD.contiguous(), weight_D, 1e-6)
        assert got.is_contiguous()
        torch.testing.assert_close(got, want)


# rotary


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (80, 80), (64, 16), (96, 24)])
def test_rotary(device: str, dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    tokens, half = 3, rotary_dim // 2
    qkv = randn(tokens, 14, head_dim, dtype=dtype, device=device)
    position_T = torch.tensor([0, 11, 5], device=device)
    angle_MR = torch.arange(12.0)[:, None] / 100 ** (torch.arange(half) / half)
    cos_sin_MR = torch.cat((angle_MR.cos(), angle_MR.sin()), -1).to(device)

    def plain(dtype: torch.dtype) -> Tensor:
        out = qkv.to(dtype).clone()
        for t, position in enumerate(position_T.tolist()):
            cos, sin = cos_sin_MR[position].to(dtype).chunk(2)
            a, b = qkv[t, :11, :half].to(dtype), qkv[t, :11, half:rotary_dim].to(dtype)
            out[t, :11, :half], out[t, :11, half:rotary_dim] = a * cos - b * sin, b * cos + a * sin
        return out

    for backend in backends("rotary", rotary_reference, device):
        got = qkv.clone()
        backend.rotary(got[:, :9], got[:, 9:11], cos_sin_MR, position_T)
        assert_as_good(got, plain(torch.float64), plain(dtype))
        assert torch.equal(got[:, 11:], qkv[:, 11:]), "wrote past its heads"
        assert torch.equal(got[..., rotary_dim:], qkv[..., rotary_dim:])


# silu_mul


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [8, 48, 1500])
def test_silu_mul(device: str, dtype: torch.dtype, activation: str, width: int) -> None:
    gate_up = randn(3, 2 * width, dtype=dtype, device=device) * 3

    def plain(dtype: torch.dtype) -> Tensor:
        gate, up = gate_up.to(dtype).chunk(2, -1)
        if activation == "silu":
            return gate / (1 + torch.exp(-gate)) * up
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up

    for backend in backends("silu_mul", silu_reference, device):
        with poisoned_memory():
            got = backend.silu_mul(gate_up, activation=activation)
        assert_as_good(got, plain(torch.float64), plain(dtype), atol=3e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_silu_mul_of_large_gates(device: str, activation: str) -> None:
    gate_up = torch.tensor([[1e4, -1e4, 80.0, -80.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    for backend in backends("silu_mul", silu_reference, device):
        got = backend.silu_mul(gate_up, activation=activation)
        torch.testing.assert_close(got, torch.tensor([[1e4, 0.0, 80.0, 0.0]], device=device))


# penalize


def test_penalize(device: str) -> None:
    rows, vocabulary = 3, 2100
    logits_SV = randn(rows, vocabulary, device=device)
    counts = torch.randint(
        0, 3, (4, vocabulary), generator=torch.Generator().manual_seed(1), dtype=torch.int32
    )
    seen = torch.rand(4, vocabulary, generator=torch.Generator().manual_seed(2)) < 0.3
    params = PenaltyParams(
        row_S=torch.tensor([2, -1, 0], device=device),
        output_count_UV=counts.to(device),
        prompt_seen_UV=seen.to(device),
        presence_S=torch.tensor([0.5, 9.0, 0.0], device=device),
        frequency_S=torch.tensor([0.25, 9.0, -0.5], device=device),
        repetition_S=torch.tensor([1.3, 9.0, 1.0], device=device),
    )
    want = logits_SV.tolist()
    for s, row in ((0, 2), (2, 0)):
        presence, frequency, repetition = (
            x[s].item() for x in (params.presence_S, params.frequency_S, params.repetition_S)
        )
        for v in range(vocabulary):
            count, x = int(counts[row, v]), want[s][v]
            if count or seen[row, v]:
                x = x / repetition if x > 0 else x * repetition
            want[s][v] = x - frequency * count - presence * (count > 0)
    for backend in backends("penalize", penalize_reference, device):
        got = logits_SV.clone()
        backend.penalize(got, params)
        torch.testing.assert_close(got.cpu(), torch.tensor(want))
        assert torch.equal(got[1], logits_SV[1])


# mask_tokens


@pytest.mark.parametrize("vocabulary", [31, 64, 2100])
def test_mask_tokens(device: str, vocabulary: int) -> None:
    logits_SV = randn(4, vocabulary, device=device)
    words = -(-vocabulary // 32) + 1
    words_KW = torch.randint(
        -(2**31), 2**31 - 1, (3, words), generator=torch.Generator().manual_seed(3), dtype=torch.int32
    )
    words_KW[1] = -1  # everything is allowed
    rows = [3, 0, 2]
    want = logits_SV.tolist()
    for k, row in enumerate(rows):
        for v in range(vocabulary):
            if not int(words_KW[k, v // 32]) >> (v % 32) & 1:
                want[row][v] = -math.inf
    for backend in backends("mask_tokens", mask_tokens_reference, device):
        got = logits_SV.clone()
        backend.mask_tokens(got, words_KW.to(device), torch.tensor(rows, device=device))
        assert got.tolist() == want


# logprobs


@pytest.mark.parametrize("vocabulary", [50, 5000])
@pytest.mark.parametrize("top", [0, 1, 5])
def test_logprobs(device: str, vocabulary: int, top: int) -> None:
    logits_SV = randn(4, vocabulary, device=device) * 5
    logits_SV[1, : vocabulary // 2] = float("-inf")
    logits_SV[2] += 300
    token_S = torch.tensor([0, vocabulary - 1, 7, 11], device=device)
    exact = logits_SV.double().log_softmax(-1)
    for backend in backends("logprobs", logprobs_reference, device):
        with poisoned_memory():
            chosen_S, top_ids_SK, top_SK = backend.logprobs(logits_SV, token_S, top)
        torch.testing.assert_close(
            chosen_S.double(), exact.gather(1, token_S[:, None])[:, 0], rtol=0, atol=1e-4
        )
        want = exact.topk(top)
        assert top_ids_SK.tolist() == want.indices.tolist()
        torch.testing.assert_close(top_SK.double(), want.values, rtol=0, atol=1e-4)
