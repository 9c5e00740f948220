"""Rows that may draw only some tokens, or may not complete some sequences. Knows rows and logits, not text.

Everything stays on the device: a row's last tokens need not have reached the host when its next one is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.plan import RowStart
from engine.transfer import to_device

_ANY, _NONE = -1, -2  # in place of a token id: matches every token; is no token


class Narrowing:
    """What `allowed_token_ids` and `banned_sequences` ask of `R` rows; a step without either pays nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allowed: dict[int, Tensor] = {}
        self._banned: dict[int, _Banned] = {}

    def start_row(self, start: RowStart) -> None:
        """Forgets the row's last request."""
        row, params = start.row, start.params
        self._allowed.pop(row, None)
        self._banned.pop(row, None)
        if params.allowed_token_ids:
            self._allowed[row] = to_device(list(params.allowed_token_ids), torch.int64, self._device)
        if params.banned_sequences:
            output = start.known_token_ids[start.prompt_len :]
            self._banned[row] = _Banned(params.banned_sequences, output, self._device)

    def any(self, rows: Sequence[int]) -> bool:
        return bool(
            (self._allowed and not self._allowed.keys().isdisjoint(rows))
            or (self._banned and not self._banned.keys().isdisjoint(rows))
        )

    def apply(self, logits_SV: Tensor, rows: Sequence[int]) -> None:
        """Takes away what a row may not draw."""
        for i, row in enumerate(rows):
            if row in self._allowed:
                ids = self._allowed[row]
                kept = logits_SV[i, ids]
                logits_SV[i].fill_(-torch.inf)
                logits_SV[i, ids] = kept
            if row in self._banned:
                self._banned[row].apply(logits_SV[i])

    def drawn(self, rows: Sequence[int], token_S: Tensor) -> None:
        """Notes what each row drew."""
        for i, row in enumerate(rows):
            if row in self._banned:
                self._banned[row].push(token_S[i : i + 1])


class _Banned:
    """One row's `B` sequences: the last token of each is banned where its first `L` are the row's last."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], output: Sequence[int], device: torch.device
    ) -> None:
        longest = max(map(len, sequences)) - 1
        first = [[_ANY] * (longest + 1 - len(ids)) + list(ids[:-1]) for ids in sequences]
        recent = [_NONE] * longest + list(output)
        self._first_BL = to_device(first, torch.int64, device)
        self._last_B = to_device([ids[-1] for ids in sequences], torch.int64, device)
        self._recent_L = to_device(recent[len(recent) - longest :], torch.int64, device)

    def apply(self, logits_V: Tensor) -> None:
        same_BL = (self._first_BL == self._recent_L) | (self._first_BL == _ANY)
        change_B = torch.zeros_like(self._last_B, dtype=logits_V.dtype)
        change_B.masked_fill_(same_BL.all(dim=-1), -torch.inf)
        logits_V.index_add_(0, self._last_B, change_B)

    def push(self, token_1: Tensor) -> None:
        if len(self._recent_L):
            self._recent_L = torch.cat([self._recent_L[1:], token_1])
