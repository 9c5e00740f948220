"""The CPU backend of `penalize`."""

from __future__ import annotations

from torch import Tensor

from kernels.native.library import library
from kernels.types import PenaltyParams

from . import reference


def penalize(logits_SV: Tensor, params: PenaltyParams) -> None:
    """See `kernels.api.penalize`."""
    lib = library()
    if lib is None:
        return reference.penalize(logits_SV, params)
    rows, vocabulary = logits_SV.shape
    lib.quire_penalize(
        logits_SV.data_ptr(), params.row_S.data_ptr(), params.output_count_UV.data_ptr(),
        params.prompt_seen_UV.data_ptr(), params.presence_S.data_ptr(), params.frequency_S.data_ptr(),
        params.repetition_S.data_ptr(), rows, vocabulary,
    )  # fmt: skip
    return None
