"""The CPU backend of `sample`: the rules and the noise of `README.md`, thresholds found by search."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native.library import library
from kernels.types import SampleParams

from . import reference


def sample(logits_SV: Tensor, params: SampleParams) -> Tensor:
    """See `kernels.api.sample`."""
    lib = library()
    if lib is None:
        return reference.sample(logits_SV, params)
    rows, vocabulary = logits_SV.shape
    token_S = torch.empty(rows, dtype=torch.int64)
    lib.quire_sample(
        logits_SV.data_ptr(), params.temperature_S.data_ptr(), params.top_k_S.data_ptr(),
        params.top_p_S.data_ptr(), params.min_p_S.data_ptr(), params.seed_S.data_ptr(),
        params.position_S.data_ptr(), token_S.data_ptr(), rows, vocabulary,
        params.all_greedy, params.any_filter,
    )  # fmt: skip
    return token_S
