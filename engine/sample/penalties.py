"""What penalised rows have said and were asked, for penalties on tokens that occur again.

It knows rows and slots in its tables; not requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.plan import RowStart
from engine.transfer import to_device
from kernels import api


class PenaltyTables:
    """What each penalised row has generated and been prompted with: `U` rows by vocabulary.

    Made at the first request that asks for a penalty, grown by doubling: most servers never see one.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slot_of_row: dict[int, int] = {}
        self._free: list[int] = []
        self._output_count_UV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._prompt_seen_UV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)

    @property
    def capacity(self) -> int:
        """Rows that the tables hold. While it stays the same, they stay where they are in memory."""
        return self._output_count_UV.shape[0]

    def slot(self, row: int) -> int:
        return self._slot_of_row.get(row, -1)

    def any(self, rows: Sequence[int]) -> bool:
        return bool(self._slot_of_row) and not self._slot_of_row.keys().isdisjoint(rows)

    def start_row(self, start: RowStart) -> None:
        """Takes or gives back the row's slot, and fills it with what is known so far."""
        if not start.params.penalised:
            slot = self._slot_of_row.pop(start.row, None)
            if slot is not None:
                self._free.append(slot)
            return
        if start.row not in self._slot_of_row:
            if not self._free:
                self._grow()
            self._slot_of_row[start.row] = self._free.pop()
        slot = self._slot_of_row[start.row]
        known = to_device(start.known_token_ids, torch.int64, self._device)
        prompt, output = known[: start.prompt_len], known[start.prompt_len :]
        self._prompt_seen_UV[slot] = False
        self._prompt_seen_UV[slot, prompt] = True
        counts_V = self._output_count_UV[slot].zero_()
        counts_V.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))  # bincount would wait

    def _grow(self) -> None:
        old = self._output_count_UV.shape[0]
        added = max(4, old)
        shape = (added, self._vocab_size)
        counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._output_count_UV = torch.cat([self._output_count_UV, counts])
        self._prompt_seen_UV = torch.cat([self._prompt_seen_UV, seen])
        self._free.extend(range(old, old + added))

    def apply(self, logits_SV: Tensor, slot_S: Tensor, floats_6S: Tensor) -> None:
        params = api.PenaltyParams(
            row_S=slot_S,
            output_count_UV=self._output_count_UV,
            prompt_seen_UV=self._prompt_seen_UV,
            presence_S=floats_6S[3],
            frequency_S=floats_6S[4],
            repetition_S=floats_6S[5],
        )
        api.penalize(logits_SV, params)

    def count(self, slot_S: Tensor, token_S: Tensor) -> None:
        """Counts the drawn tokens of rows with a slot."""
        at_S = slot_S.clamp(min=0) * self._vocab_size + token_S.clamp(min=0)
        self._output_count_UV.view(-1).index_add_(0, at_S, (slot_S >= 0).to(torch.int32))
