"""The tensors of one forward pass. Built by `engine.exec.batch`, read by the model.

Shapes are in `kernels/README.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.api import AttentionBatch, WantedTokens


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """A flat batch: T tokens of S sequences, decodes first.

    Attributes:
        token_id_T: int64.
        position_T: int64, absolute positions for the rotary tables.
        slot_T: int64 slots where this step's K and V go; -1 writes nothing.
        attention: page tables and lengths.
        kv: per layer, `kv_N2GPD`.
        wanted: whose hidden states are read; None: everybody's.
    """

    token_id_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    attention: AttentionBatch
    kv: Sequence[Tensor]
    wanted: WantedTokens | None = None
