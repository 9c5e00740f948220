"""Small copies between host and device that do not wait for the device.

Each copy has pinned memory of its own: a buffer that a copy may still read is never written again. PyTorch
hands the memory out again once the copy is done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host numbers (nested lists) on the device, the copy under way."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """Starts a copy to pinned host memory. Whatever becomes of `x`, the copy is of what it was."""
    if not x.is_cuda:
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def send(values: Tensor, target: Tensor) -> None:
    """Starts a copy of host numbers into memory that is on the device already."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
