"""What a figure was measured on: processor, library versions, commit. For the JSON beside each figure."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def describe(device: str = "cpu") -> dict[str, str | int]:
    """Hardware, versions and commit, as plain values."""
    import torch

    facts: dict[str, str | int] = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = _driver()
    return facts


def save(path: Path, record: dict[str, Any]) -> None:
    """Writes figures. Whoever is stopped in the middle of it leaves what was there before."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1, default=str) + "\n")
    new.replace(path)


def commit() -> str:
    """The short commit, with a + where the tree differs from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
