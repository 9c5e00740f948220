"""The CPU backend of `logprobs`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native.library import library

from . import reference


def logprobs(logits_SV: Tensor, token_S: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.api.logprobs`. Among equal logits the lowest ids come first."""
    lib = library()
    if lib is None:
        return reference.logprobs(logits_SV, token_S, top)
    rows, vocabulary = logits_SV.shape
    chosen_S = torch.empty(rows)
    top_ids_SK, top_SK = torch.empty((rows, top), dtype=torch.int64), torch.empty((rows, top))
    lib.quire_logprobs(
        logits_SV.data_ptr(), token_S.data_ptr(), chosen_S.data_ptr(), top_ids_SK.data_ptr(),
        top_SK.data_ptr(), rows, vocabulary, top,
    )  # fmt: skip
    return chosen_S, top_ids_SK, top_SK
