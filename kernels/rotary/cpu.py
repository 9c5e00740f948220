"""The CPU backend of `rotary`."""

from __future__ import annotations

from torch import Tensor

from kernels.native.library import DTYPE_CODE, library

from . import reference


def rotary(q_THD: Tensor, k_TGD: Tensor, cos_sin_MR: Tensor, position_T: Tensor) -> None:
    """See `kernels.api.rotary`."""
    lib = library()
    code = DTYPE_CODE.get(q_THD.dtype)
    if lib is None or code is None:
        return reference.rotary(q_THD, k_TGD, cos_sin_MR, position_T)
    tokens, heads, _ = q_THD.shape
    q_stride, q_head_stride, _ = q_THD.stride()
    k_stride, k_head_stride, _ = k_TGD.stride()
    lib.quire_rotary(
        code, q_THD.data_ptr(), k_TGD.data_ptr(), cos_sin_MR.data_ptr(), position_T.data_ptr(), tokens,
        q_stride, q_head_stride, k_stride, k_head_stride, heads, k_TGD.shape[1], cos_sin_MR.shape[1],
    )  # fmt: skip
    return None
