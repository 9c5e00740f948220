"""The CPU backend of `copy_blocks`: a block is one contiguous unit, whatever its layout inside."""

from __future__ import annotations

from torch import Tensor

from kernels.native.library import library

from . import reference


def copy_blocks(kv_N2GPD: Tensor, src_: Tensor, dst_: Tensor) -> None:
    """See `kernels.api.copy_blocks`."""
    lib = library()
    if lib is None:
        return reference.copy_blocks(kv_N2GPD, src_, dst_)
    block_bytes = kv_N2GPD.stride(0) * kv_N2GPD.element_size()
    lib.quire_copy_blocks(kv_N2GPD.data_ptr(), src_.data_ptr(), dst_.data_ptr(), src_.shape[0], block_bytes)
    return None
