"""StepPlan -> the tensors of one forward pass.

    sequence    |  s0 |  s1 |        s2        |    s3    |      decodes (one token) first
    token_T     |  *  |  7  |  4  9  1  3  8   |  5  2    |      * = the row's last sampled token
    query_start 0     1     2                  7          9
    position_T  | 31  | 12  |  0  1  2  3  4   | 64 65    |
    slot_T        page_table[row, position // P] * P + position % P

Everything the host knows goes over in one copy; slots and last tokens are looked up on the device, so a
step can be launched before the previous one's tokens are known to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from engine.exec.rows import Rows
from engine.model.batch import ForwardBatch
from engine.plan import StepPlan
from kernels.api import AttentionBatch, WantedTokens

_FROM_ROW = -1  # a token id that stands for "the row's last sampled token"


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """One step on the device.

    Attributes:
        forward: what the model reads.
        sample_index: positions in the flat batch whose logits are sampled, one per sampling sequence.
        sample_row: those sequences' rows.
        sample_position: the positions of the tokens to be drawn.
    """

    forward: ForwardBatch
    sample_index: Tensor
    sample_row: Tensor
    sample_position: Tensor


def build(plan: StepPlan, rows: Rows, kv: Sequence[Tensor], all_hidden: bool = True) -> BatchTensors:
    """Makes the tensors of a step; `rows` must already hold the plan's page-table entries.

    Args:
        all_hidden: every token's hidden state is read, not only those that are sampled from.
    """
    host = _HostArrays(plan)
    device = rows.page_table_RB.device
    packed = torch.from_numpy(host.packed)
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    fields = iter(torch.split(packed, host.sizes))
    row_S, seq_len_S, query_start_S1 = next(fields), next(fields), next(fields)
    token_T, position_T, row_T = next(fields), next(fields), next(fields)
    sample_index, sample_row, sample_position = next(fields), next(fields), next(fields)

    if host.reads_last_token:
        token_T = torch.where(token_T == _FROM_ROW, rows.last_token_R[row_T], token_T)
    block_size = kv[0].shape[3]
    max_blocks = -(-host.max_seq_len // block_size)
    block_T = rows.page_table_RB[row_T, position_T // block_size].to(torch.int64)
    attention = AttentionBatch(
        page_table_SB=rows.page_table_RB[row_S, :max_blocks],
        query_start_S1=query_start_S1.to(torch.int32),
        seq_len_S=seq_len_S.to(torch.int32),
        num_decodes=host.num_decodes,
        max_query_len=host.max_query_len,
        max_seq_len=host.max_seq_len,
    )
    slot_T = block_T * block_size + position_T % block_size
    wanted = None
    if not all_hidden and len(sample_index) < len(token_T):
        table_SB = rows.page_table_RB[sample_row, :max_blocks]
        wanted = WantedTokens(sample_index, _single_queries(table_SB, sample_position, host.max_seq_len))
    forward = ForwardBatch(token_T, position_T, slot_T, attention, kv, wanted)
    return BatchTensors(forward, sample_index, sample_row, sample_position)


def _single_queries(page_table_SB: Tensor, seq_len_S: Tensor, max_seq_len: int) -> AttentionBatch:
    """The last token of each sequence, alone."""
    count = len(seq_len_S)
    return AttentionBatch(
        page_table_SB=page_table_SB,
        query_start_S1=torch.arange(count + 1, dtype=torch.int32, device=seq_len_S.device),
        seq_len_S=seq_len_S.to(torch.int32),
        num_decodes=count,
        max_query_len=1,
        max_seq_len=max_seq_len,
    )


class _HostArrays:
    """The plan as flat integer arrays, packed into one for a single copy to the device."""

    def __init__(self, plan: StepPlan) -> None:
        sequences = plan.sequences
        row_S = np.array([s.row for s in sequences], dtype=np.int64)
        start_S = np.array([s.start for s in sequences], dtype=np.int64)
        count_S = np.array([s.num_tokens for s in sequences], dtype=np.int64)
        end_S = start_S + count_S
        query_start_S1 = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum(count_S, out=query_start_S1[1:])
        total = int(query_start_S1[-1])

        tokens = chain.from_iterable(s.token_ids or (_FROM_ROW,) for s in sequences)
        token_T = np.fromiter(tokens, dtype=np.int64, count=total)
        position_T = np.arange(total) + np.repeat(start_S - query_start_S1[:-1], count_S)
        samples = np.array([s.samples for s in sequences], dtype=bool)

        arrays = (
            row_S, end_S, query_start_S1, token_T, position_T, np.repeat(row_S, count_S),
            query_start_S1[1:][samples] - 1, row_S[samples], end_S[samples],
        )  # fmt: skip
        self.packed = np.concatenate(arrays)
        self.sizes = [len(array) for array in arrays]
        self.num_decodes = int(np.argmax(count_S > 1)) if (count_S > 1).any() else len(sequences)
        self.max_query_len = int(count_S.max())
        self.max_seq_len = int(end_S.max())
        self.reads_last_token = bool((token_T == _FROM_ROW).any())
