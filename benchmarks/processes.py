"""What the kernel says of processes: their children, CPU time and memory. Linux only."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Direct children."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    return [pid, *(below for child in children(pid) for below in tree(child))]


def cpu_s(pid: int) -> float:
    """CPU seconds spent so far, all threads."""
    return sum(_cpu_ticks(pid)[:2]) / _TICKS_PER_S


def tree_cpu_s(pid: int) -> float:
    """CPU seconds spent so far by a process and all below it, those included that have ended."""
    return sum(sum(_cpu_ticks(each)) for each in tree(pid)) / _TICKS_PER_S


def machine_cpu_s() -> float:
    """CPU seconds spent so far by every process, and by other guests of the same host.

    Interrupts are left out: no process is charged for them.
    """
    user, nice, system, _, _, _, _, stolen = _machine_ticks()
    return (user + nice + system + stolen) / _TICKS_PER_S


def _cpu_ticks(pid: int) -> tuple[int, int, int, int]:
    """User, system, and both again of the children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, children_user, children_system = map(int, fields[11:15])
    return user, system, children_user, children_system


def _machine_ticks() -> list[int]:
    """User, nice, system, idle, waiting for disks, interrupts, soft interrupts, stolen."""
    return [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def rss_bytes(pid: int) -> int:
    """Resident memory."""
    return _status(pid, "VmRSS")


def pss_bytes(pid: int) -> int:
    """Resident memory, with a page that n processes share counted as 1/n: sums over processes are right."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
