"""The runner's persistent tensors: one permanent row per live request.

A row holds what a step needs and the plan does not repeat: the page table and the last sampled token.
Rows are written by plans (`start`, `append`), in step order, on the device's stream; the host keeps only
how many blocks each row has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.dist.transfer import to_device
from engine.plan import StepPlan


class Rows:
    """`R` rows: `page_table_RB` int32 and `last_token_R` int64, on the device."""

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.page_table_RB: Tensor = torch.zeros((num_rows, max_blocks), dtype=torch.int32, device=device)
        self.last_token_R: Tensor = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._num_blocks = [0] * num_rows
        self._device = device

    def apply(self, plan: StepPlan) -> None:
        """Writes the plan's new page-table entries, all rows in one scatter."""
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []

        def extend(row: int, block_ids: tuple[int, ...]) -> None:
            first = self._num_blocks[row]
            rows.extend([row] * len(block_ids))
            columns.extend(range(first, first + len(block_ids)))
            blocks.extend(block_ids)
            self._num_blocks[row] = first + len(block_ids)

        for start in plan.row_starts:
            self._num_blocks[start.row] = 0
            extend(start.row, start.block_ids)
        for sequence in plan.sequences:
            if sequence.new_block_ids:
                extend(sequence.row, sequence.new_block_ids)
        if rows:
            index = to_device([rows, columns, blocks], torch.int64, self._device)
            self.page_table_RB[index[0], index[1]] = index[2].to(torch.int32)
