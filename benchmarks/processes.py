"""What the kernel says of processes: their children, CPU time and memory. Linux only."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

ENDED = (FileNotFoundError, ProcessLookupError)  # of a process or thread that is no more
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Direct children."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(*ENDED):
            found += map(int, (thread / "children").read_text().split())
    return found


def tree(pid: int) -> list[int]:
    """A process and all below it that are there."""
    try:
        below = children(pid)
    except ENDED:
        return []
    return [pid, *(each for child in below for each in tree(child))]


def cpu_s(pid: int) -> float:
    """CPU seconds spent so far, all threads."""
    return sum(_cpu_ticks(pid)[:2]) / _TICKS_PER_S


def tree_cpu_s(pid: int) -> float:
    """CPU seconds spent so far by a process and all below it, those included that have ended."""
    total = 0
    for each in tree(pid):
        with suppress(*ENDED):
            total += sum(_cpu_ticks(each))
    return total / _TICKS_PER_S


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
    return _field(Path(f"/proc/{pid}/status"), "VmRSS")


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and all below it; a page that several of them share counts once."""
    total = 0
    for each in tree(pid):
        with suppress(*ENDED):
            total += _field(Path(f"/proc/{each}/smaps_rollup"), "Pss")
    return total


def _field(file: Path, name: str) -> int:
    """Bytes, from a line `name:  123 kB`."""
    for line in file.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
