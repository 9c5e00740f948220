"""The CPU backend of `mask_tokens`."""

from __future__ import annotations

from torch import Tensor

from kernels.native.library import library

from . import reference


def mask_tokens(logits_SV: Tensor, words_KW: Tensor, row_K: Tensor) -> None:
    """See `kernels.api.mask_tokens`."""
    lib = library()
    if lib is None:
        return reference.mask_tokens(logits_SV, words_KW, row_K)
    rows, words = words_KW.shape
    lib.quire_mask_tokens(
        logits_SV.data_ptr(), words_KW.data_ptr(), row_K.data_ptr(), rows, words, logits_SV.shape[1]
    )
    return None
