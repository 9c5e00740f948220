"""The three ops, one after another."""

from __future__ import annotations

from torch import Tensor

from kernels.rms_norm.reference import rms_norm
from kernels.rotary.reference import rotary
from kernels.types import HeadNorms
from kernels.write_kv.reference import write_kv


def rotate_and_write(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_sin_MR: Tensor,
    position_T: Tensor,
    kv_N2GPD: Tensor,
    slot_T: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Returns the queries as attention wants them; keys and values are in memory then."""
    if norms is not None:
        q_THD = rms_norm(q_THD, norms.q_weight_D, norms.eps, offset=norms.offset)
        k_TGD = rms_norm(k_TGD, norms.k_weight_D, norms.eps, offset=norms.offset)
    rotary(q_THD, k_TGD, cos_sin_MR, position_T)
    write_kv(k_TGD, v_TGD, kv_N2GPD, slot_T)
    return q_THD
