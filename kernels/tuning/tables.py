"""Launch shapes that were measured best, by GPU: one JSON file each, written by `benchmarks.kernels --tune`.

A GPU without a file takes the defaults of the kernel's own `triton_config.py` or launcher, and so does
whatever its file does not name. Nothing is tuned at run time.

    {"gpu": "NVIDIA H200", "commit": "...", "decode": {"128 bfloat16": {"tile": 64, "warps": 4, "stages": 3}}}
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


def file_name(gpu: str) -> str:
    """The file of a GPU.

    >>> file_name("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3.json'
    """
    return "-".join(gpu.lower().split()) + ".json"


def tuned(device: torch.device, kernel: str, key: str) -> dict[str, Any]:
    """The launch shape's fields that differ from the default; none on a GPU without a table."""
    if device.type != "cuda":
        return {}
    entries: dict[str, Any] = read_table(torch.cuda.get_device_name(device)).get(kernel, {})
    return dict(entries.get(key, {}))


@functools.cache
def read_table(gpu: str) -> dict[str, Any]:
    """A GPU's whole table; empty where there is none."""
    path = FOLDER / file_name(gpu)
    if not path.exists():
        return {}
    table: dict[str, Any] = json.loads(path.read_text())
    return table
