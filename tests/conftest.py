"""Shared test set-up: Hypothesis profiles, and a reason for every GPU test that cannot run here."""

from __future__ import annotations

import os

import pytest

# Before anything imports triton: without a GPU its kernels run in the interpreter.
try:
    import torch

    HAS_CUDA = torch.cuda.is_available()
except ImportError:
    HAS_CUDA = False
else:
    # Test models are tiny: a second thread costs them more than it helps, most of all when the machine is
    # busy. Tests of threading ask for their own.
    torch.set_num_threads(1)
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
