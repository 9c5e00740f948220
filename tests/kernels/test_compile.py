"""What the compiler makes of the Triton kernels for sm_80, sm_89 and sm_90: no GPU is needed to see a spill.

One variant of each kind; `python -m benchmarks.gpu_compile` has them all. It cannot see speed, races or wrong
addresses; the `gpu` tests and `benchmarks/kernels/` are for those.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu_compile import ARCHS, SHARED_BYTES, compile_all

ATTENTION = ("_decode", "_prefill")
Compiled = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def compiled() -> Iterator[Compiled]:
    """Every kernel's needs, by architecture. Other processes compile: here Triton is an interpreter."""
    yield compile_all(ARCHS, quick=True, timeout_s=280)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_everything_fits(compiled: Compiled, arch: int) -> None:
    names = {row["kernel"] for row in compiled[arch]}
    assert names >= {*ATTENTION, "_plan", "_rotate_and_write", "_rms_norm", "_draw", "_thresholds"}
    assert names >= {"_survey", "_narrow", "_pick", "_penalize", "_logprobs", "_decode_inputs"}
    for row in compiled[arch]:
        assert row["spilled_bytes"] == 0, row
        assert row["instructions"].get("LDL", 0) + row["instructions"].get("STL", 0) == 0, row
        assert row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_BYTES[arch], row


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_uses_tensor_cores_and_overlaps_its_loads(compiled: Compiled, arch: int) -> None:
    for row in compiled[arch]:
        if row["kernel"] not in ATTENTION or "fp32" in row["case"]:
            continue
        # wgmma needs 64 rows per warp group: prefill has them, decode's 16 take the older instruction.
        wanted = "HGMMA" if arch >= 90 and row["kernel"] == "_prefill" else "HMMA"
        assert row["instructions"].get(wanted, 0) > 0, row
        assert max(row["pending_loads"]) >= 2, f"K and V of the next tile are not read ahead: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_memory_bound_kernels_read_16_bytes_at_a_time(compiled: Compiled, arch: int) -> None:
    for row in compiled[arch]:
        if row["kernel"] in ("_rotate_and_write", "_copy_blocks", "_rms_norm", "_silu_mul", "_draw"):
            assert row["instructions"].get("LDG.128", 0) > 0, row
        if row["kernel"] == "_decode":
            assert row["instructions"].get("LDGSTS.128", 0) > 0, row
