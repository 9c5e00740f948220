"""Scatters new keys and values into KV memory: `rotate_and_write` without queries, norms and rotation."""

from __future__ import annotations

from torch import Tensor

from kernels.rotate_and_write.triton import launch


def write_kv(k_TGD: Tensor, v_TGD: Tensor, kv_N2GPD: Tensor, slot_T: Tensor) -> None:
    """Writes token t's key and value to its slot; slot -1 writes nothing."""
    launch(None, k_TGD, v_TGD, None, (kv_N2GPD, slot_T))
