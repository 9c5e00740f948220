"""What launchers ask of the GPU they launch on. In the interpreter it is a Hopper with one SM."""

from __future__ import annotations

import torch


def multiprocessors(device: torch.device) -> int:
    """How many SMs the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def hopper(device: torch.device) -> bool:
    """Whether tensor cores read operands from shared memory: on Hopper and Blackwell, not on the latter's
    cards for desktops (12.0)."""
    return capability(device)[0] in (9, 10)


def roomy(device: torch.device) -> bool:
    """Whether a program may have 163 KB of shared memory and more: also an A100 and an Orin. Others stop at
    99 KB."""
    return hopper(device) or capability(device) in ((8, 0), (8, 7))
