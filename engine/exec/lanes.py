"""What the host says of the sequences of decode steps, and when it has to.

A decode step computes one token of each sequence, as a rule the one drawn in the step before. The device
has that, moves positions on by itself and keeps the page tables; so the host only says who is in which lane,
which blocks are new, and which tokens were not drawn. While nothing of it changes, it says nothing.

    lanes_5S    row, position, token or -1, column of a new block or -1, new block     (kernels/decode_inputs)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.exec.rows import Rows
from engine.plan import SequencePlan
from engine.transfer import send


class Lanes:
    """The lanes of up to `most` sequences, on the device, and what was last said of them.

    Batches of all sizes share the memory: whoever changes the size says everything anew.
    """

    def __init__(self, rows: Rows, most: int) -> None:
        self._rows = rows
        self._memory = torch.zeros(5 * most, dtype=torch.int64, device=rows.page_table_RB.device)
        self._said: tuple[int, list[int]] | None = None

    def tensor(self, size: int) -> Tensor:
        """`lanes_5S` of a batch padded to `size`."""
        return self._memory[: 5 * size].view(5, size)

    def forget(self) -> None:
        """Something else was computed: positions on the device are no longer those of the next step."""
        self._said = None

    def pad(self, size: int) -> None:
        """Fills all lanes with padding."""
        send(torch.from_numpy(self._padded(size)), self.tensor(size))
        self._said = None

    def say(self, size: int, sequences: Sequence[SequencePlan]) -> None:
        """Tells the device what it cannot know of this step, in one copy, or nothing."""
        rows = [sequence.row for sequence in sequences]
        told = any(sequence.token_ids or sequence.new_block_ids for sequence in sequences)
        if not told and self._said == (size, rows):
            return
        host_5S = self._padded(size)
        host_5S[0, : len(rows)] = rows
        host_5S[1, : len(rows)] = [sequence.start for sequence in sequences]
        for lane, sequence in enumerate(sequences if told else ()):
            if sequence.token_ids:
                (host_5S[2, lane],) = sequence.token_ids
            if sequence.new_block_ids:
                (block,) = sequence.new_block_ids
                host_5S[3:, lane] = self._rows.extend(sequence.row, 1), block
        send(torch.from_numpy(host_5S), self.tensor(size))
        self._said = size, rows

    def _padded(self, size: int) -> NDArray[np.int64]:
        padding = np.array([[self._rows.padding], [-1], [-1], [-1], [0]], dtype=np.int64)
        return padding.repeat(size, axis=1)
