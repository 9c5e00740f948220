"""What the device is and what it offers. The only place that asks the operating system or CUDA."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from engine.config import MachineFacts
from engine.errors import ConfigError
from kernels import api


def choose(asked: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {asked}: choose auto, cpu or cuda.")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: this torch sees no CUDA device. Check `nvidia-smi` and that torch is a CUDA "
            "build, or use --device cpu."
        )
    use_cuda = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def measure(device: torch.device) -> MachineFacts:
    """Memory and fast types of the device, before anything is allocated on it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        converts_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
        return MachineFacts("cuda", name, total, free, ("bfloat16", "float16"), converts_fp8=converts_fp8)
    total, free = _host_memory()
    return MachineFacts(
        "cpu", "this CPU", total, free, _fast_cpu_dtypes(), count_cores(), independent_rows=api.is_native()
    )


def count_cores() -> int:
    """Physical cores that this process may use; fewer where its container's quota is less."""
    cores = {_core_of(cpu) for cpu in os.sched_getaffinity(0)}
    quota = _cgroup_cpus()
    return max(1, len(cores) if quota is None else min(len(cores), math.ceil(quota)))


def _core_of(cpu: int) -> tuple[str, str]:
    """Two CPUs of one core share its units: a second thread there would only wait."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "", str(cpu)


def _cgroup_cpus() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _fast_cpu_dtypes() -> tuple[str, ...]:
    """Types that a checkpoint may stay in. Instructions for bf16 make it the fastest of all. Without them the
    native library makes integers of bf16 and widens fp16 as it reads it, which halves what is read; plain
    torch multiplies both far slower than fp32."""
    flags = _cpu_flags()
    if "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags:
        return ("bfloat16", "float32")
    return ("bfloat16", "float16", "float32") if api.is_native() else ("float32",)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _host_memory() -> tuple[int, int]:
    """(total, available) bytes, the container's limit included where there is one."""
    info = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, value = line.split(":", 1)
        info[key] = int(value.split()[0]) * 1024
    total, available = info["MemTotal"], info["MemAvailable"]
    limit, used = _cgroup_memory()
    if limit is not None and limit < total:
        return limit, min(available, limit - used)
    return total, available


def _cgroup_memory() -> tuple[int | None, int]:
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return None, 0
    return (None if limit == "max" else int(limit)), used
