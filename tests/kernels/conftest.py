"""Runs each kernel test twice: in Triton's interpreter on CPU tensors, and on a CUDA device if there is one.

`tests/conftest.py` chooses between the two before Triton is imported, for Triton can be only one of them in a
process: `cpu` tests skip where there is a GPU, `cuda` tests where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a test's tensors, on which Triton kernels work."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        yield "cuda"
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU in this process; its interpreter is off")
    import numpy as np

    from tests.helpers.kernels import mend_interpreter

    mend_interpreter()
    threads = torch.get_num_threads()
    # Tensors are tiny here: threads would only wait for each other.
    torch.set_num_threads(1)
    # The interpreter computes lanes that masks discard, so numpy sees 0 / 0 and inf - inf.
    with np.errstate(all="ignore"):
        yield "cpu"
    torch.set_num_threads(threads)
