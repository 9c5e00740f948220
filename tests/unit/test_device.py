"""What the engine finds out about the machine it runs on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.exec import device


def test_cores_are_at_most_the_cpus_of_this_process() -> None:
    assert 1 <= device.count_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("quota, cores", [(None, 2), (8.0, 2), (1.5, 2), (1.0, 1), (0.2, 1)])
def test_threads_of_one_core_count_once_and_a_quota_limits(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(device, "_core_of", lambda cpu: ("0", str(cpu // 2)))
    monkeypatch.setattr(device, "_cgroup_cpus", lambda: quota)
    assert device.count_cores() == cores


def test_bf16_checkpoints_stay_bf16_where_the_library_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr("engine.exec.device.api.is_native", lambda: True)
    assert device._fast_cpu_dtypes() == ("bfloat16", "float16", "float32")
    monkeypatch.setattr("engine.exec.device.api.is_native", lambda: False)
    assert device._fast_cpu_dtypes() == ("float32",)


def test_an_unreadable_topology_counts_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Path, *args: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert device.count_cores() == len(os.sched_getaffinity(0))
