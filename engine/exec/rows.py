"""The runner's persistent tensors: one permanent row per live request.

A row holds what a step needs and the plan does not repeat: the page table and the last sampled token.
Rows are written by plans (`start`, then `append`), in step order, on the device's stream; the host keeps only
how many blocks each row has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.plan import StepPlan
from engine.transfer import to_device


class Rows:
    """`R` rows: `page_table_RB` int32 and `last_token_R` int64, on the device.

    Attributes:
        padding: one row more, which serves nobody: the padding of a batch points there.
    """

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.padding = num_rows
        shape = (num_rows + 1, max_blocks)
        self.page_table_RB: Tensor = torch.zeros(shape, dtype=torch.int32, device=device)
        self.last_token_R: Tensor = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._num_blocks = [0] * num_rows
        self._device = device

    def extend(self, row: int, num_blocks: int) -> int:
        """Counts a row's new blocks; returns the column of the first one."""
        first = self._num_blocks[row]
        self._num_blocks[row] = first + num_blocks
        return first

    def start(self, plan: StepPlan) -> None:
        """Writes the page tables that the plan's row starts come with."""
        for start in plan.row_starts:
            self._num_blocks[start.row] = 0
        self._enter([(start.row, start.block_ids) for start in plan.row_starts])

    def append(self, plan: StepPlan) -> None:
        """Writes the new blocks of the plan's sequences."""
        self._enter([(s.row, s.new_block_ids) for s in plan.sequences if s.new_block_ids])

    def _enter(self, blocks_of_rows: list[tuple[int, tuple[int, ...]]]) -> None:
        """Adds blocks to page tables, all rows in one scatter."""
        entries = [
            (row, column, block)
            for row, blocks in blocks_of_rows
            for column, block in enumerate(blocks, self.extend(row, len(blocks)))
        ]
        if entries:
            index_3X = to_device(entries, torch.int64, self._device).T
            self.page_table_RB[index_3X[0], index_3X[1]] = index_3X[2].to(torch.int32)
