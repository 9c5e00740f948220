"""What the compiler makes of the Triton kernels for sm_80 and sm_90: no GPU is needed to see a spill.

It cannot see speed, races or wrong addresses; the `gpu` tests and `benchmarks/kernels.py` are for those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

ARCHS = (80, 90)
# What one program may have of an SM's shared memory: 163 KB on an A100, 227 KB on an H100 or H200.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
ATTENTION = ("_decode", "_prefill")


@pytest.fixture(scope="session")
def compiled() -> Iterator[dict[int, list[dict[str, Any]]]]:
    """Every kernel's needs, by architecture. A process for each: here Triton is an interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = {
        arch: subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compile_kernels", str(arch)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for arch in ARCHS
    }
    results = {}
    for arch, process in processes.items():
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        results[arch] = [json.loads(line) for line in out.splitlines()]
        print(f"\nsm_{arch}: registers, shared bytes, warps")
        for row in results[arch]:
            print(
                f"  {row['kernel']:13} {row['case']:20}", row["registers"], row["shared_bytes"], row["warps"]
            )
    yield results


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_everything_fits(compiled: dict[int, list[dict[str, Any]]], arch: int) -> None:
    names = {row["kernel"] for row in compiled[arch]}
    assert names >= {*ATTENTION, "_merge", "_write_kv", "_rms_norm", "_rotary", "_draw", "_thresholds"}
    assert names >= {"_survey", "_narrow", "_pick", "_penalize", "_logprobs", "_decode_inputs"}
    for row in compiled[arch]:
        assert row["spilled_bytes"] == 0, row
        assert row["instructions"].get("LDL", 0) + row["instructions"].get("STL", 0) == 0, row
        assert row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_BYTES[arch], row


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_uses_tensor_cores_and_overlaps_its_loads(
    compiled: dict[int, list[dict[str, Any]]], arch: int
) -> None:
    for row in compiled[arch]:
        if row["kernel"] not in ATTENTION:
            continue
        # wgmma needs 64 rows per warp group: prefill has them, decode's 16 take the older instruction.
        wanted = "HGMMA" if arch >= 90 and row["kernel"] == "_prefill" else "HMMA"
        assert row["instructions"].get(wanted, 0) > 0, row
        if row["kernel"] == "_decode":
            assert max(row["pending_loads"]) >= 2, f"K and V of the next tile are not read ahead: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_memory_bound_kernels_read_16_bytes_at_a_time(
    compiled: dict[int, list[dict[str, Any]]], arch: int
) -> None:
    for row in compiled[arch]:
        if row["kernel"] in ("_write_kv", "_copy_blocks", "_rms_norm", "_rotary", "_silu_mul", "_draw"):
            assert row["instructions"].get("LDG.E.128", 0) > 0, row
