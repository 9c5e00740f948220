"""The inputs of a decode step in plain torch, without any look at a value."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.types import DecodeInputs


def decode_inputs(
    lanes_5S: Tensor, last_token_R: Tensor, page_table_RB: Tensor, block_size: int, out: DecodeInputs
) -> None:
    """Fills `out` and moves the lanes on by one position. `README.md` says what is what."""
    row_S, position_S, token_S, column_S, block_S = lanes_5S
    at_S = column_S.clamp(min=0)
    entry_S = torch.where(column_S >= 0, block_S.to(torch.int32), page_table_RB[row_S, at_S])
    page_table_RB[row_S, at_S] = entry_S
    real_S = position_S >= 0
    out.token_id_S.copy_(torch.where(token_S >= 0, token_S, last_token_R[row_S]))
    out.position_S.copy_(position_S.clamp(min=0))
    block_S = page_table_RB[row_S, out.position_S // block_size].to(torch.int64)
    slot_S = block_S * block_size + out.position_S % block_size
    out.slot_S.copy_(torch.where(real_S, slot_S, -1))
    out.next_position_S.copy_(position_S + 1)
    out.seq_len_S.copy_(position_S + 1)
    out.page_table_SB.copy_(page_table_RB[row_S])
    position_S += real_S
    token_S.fill_(-1)
