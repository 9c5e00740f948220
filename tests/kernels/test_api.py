"""The one door: what it refuses, how it dispatches, and that a machine without Triton can use it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from kernels import api
from kernels.paged_attention import reference
from tests.helpers.kernels import paged_case, sample_params


def test_cpu_ops_never_import_triton() -> None:
    program = (
        "import sys, torch; from kernels import api\n"
        "x = torch.randn(2, 8); api.rms_norm(x, x[0], 1e-6); api.silu_mul(x)\n"
        "assert 'triton' not in sys.modules, 'triton was imported'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_backend_name_says_what_runs() -> None:
    assert "cpu" in api.backend_name("cpu").lower()


@pytest.mark.gpu
def test_backend_name_of_a_gpu() -> None:
    assert api.backend_name("cuda").startswith("triton ")


@pytest.mark.gpu
def test_cuda_tensors_go_to_triton() -> None:
    case = paged_case([5, 40, 33], [1, 1, 20], head_dim=64, dtype=torch.bfloat16, device="cuda")
    got = api.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.1)
    want = reference.paged_attention(case.q_THD, case.kv_N2GPD, case.batch, scale=0.1)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_no_rows_are_no_work() -> None:
    x = torch.empty(0, 8)
    assert api.rms_norm(x, torch.ones(8), 1e-6).shape == (0, 8)
    assert api.silu_mul(x).shape == (0, 4)
    assert api.sample(torch.empty(0, 9), sample_params(0)).shape == (0,)


def test_rms_norm_of_heads_equals_flat() -> None:
    x_THD = torch.randn(3, 6, 8)[:, 1:5]
    weight_D = torch.randn(8)
    want = api.rms_norm(x_THD.reshape(-1, 8), weight_D, 1e-6).view(3, 4, 8)
    assert torch.equal(api.rms_norm(x_THD, weight_D, 1e-6), want)


def bad_calls() -> dict[str, tuple[str, Any]]:
    case = paged_case([5], [1], heads=4, groups=2, head_dim=32)
    q, kv, batch = case.q_THD, case.kv_N2GPD, case.batch
    k = torch.zeros(1, 2, 32)
    slot = torch.zeros(1, dtype=torch.int64)
    table = torch.zeros(4, 32)
    words = torch.zeros(1, 1, dtype=torch.int32)

    def attend(q: Any = q, kv: Any = kv, window: int = 0, **changes: Any) -> Any:
        changed = dataclasses.replace(batch, **changes)
        return lambda: api.paged_attention(q, kv, changed, scale=1.0, window=window)

    return {
        "q of another dtype": ("q must be", attend(q=q.half())),
        "q of another head dim": ("multiple of the kv heads", attend(q=q[..., :16].contiguous())),
        "heads no multiple": ("multiple of the kv heads", attend(q=q[:, :3])),
        "kv not contiguous": ("KV memory must be", attend(kv=kv.transpose(2, 3))),
        "lengths of 64 bits": ("int32", attend(seq_len_S=batch.seq_len_S.long())),
        "too few starts": ("query start", attend(query_start_S1=batch.query_start_S1[:1])),
        "too many decodes": ("num_decodes", attend(num_decodes=2)),
        "a negative window": ("window", attend(window=-1)),
        "k of another shape": ("k and v must be", lambda: api.write_kv(k[:, :1], k, kv, slot)),
        "slots of 32 bits": ("slots must be", lambda: api.write_kv(k, k, kv, slot.int())),
        "unpaired blocks": ("as many", lambda: api.copy_blocks(kv, slot, slot.repeat(2))),
        "a narrow weight": ("weight", lambda: api.rms_norm(k[0], torch.ones(8), 1e-6)),
        "a residual of another dtype": (
            "residual",
            lambda: api.rms_norm(k[0], torch.ones(32), 1e-6, residual_TE=k[0].half()),
        ),
        "a table too wide": ("R dims", lambda: api.rotary(q, k, torch.zeros(4, 64), slot)),
        "a table of bf16": ("fp32", lambda: api.rotary(q, k, table.bfloat16(), slot)),
        "an unknown activation": ("activation", lambda: api.silu_mul(k[0], activation="relu")),
        "logits of bf16": ("logits", lambda: api.sample(k[0].bfloat16(), sample_params(2))),
        "masks of too few words": ("masks", lambda: api.mask_tokens(k[0], words[:, :0], slot[:1])),
        "masks of another type": ("masks", lambda: api.mask_tokens(k[0], words.long(), slot[:1])),
        "masks for more rows": ("masks", lambda: api.mask_tokens(k[0], words, slot[:1].repeat(2))),
        "top past the vocabulary": ("top", lambda: api.logprobs(k[0], slot.repeat(2), 33)),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_it_refuses(name: str) -> None:
    message, call = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()
