"""Draws the next token of each row, batched, on the device. It knows rows and logits; not requests.

Order: penalties, logit bias, minimum length, allowed and banned tokens, grammar -> temperature -> top-k,
top-p, min-p -> draw. The draw depends on the row's seed and the token's position alone, so the same seed
gives the same text in any batch.
Log probabilities are the model's own, before all of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.plan import NOT_FINITE, NOTHING_LEFT, RowStart, TokenMasks
from engine.sample.narrowing import Narrowing
from engine.sample.penalties import PenaltyTables
from engine.transfer import to_device
from kernels import api


class PlainDraw(NamedTuple):
    """What a draw launches that looks at no host state.

    Attributes:
        filters: some row has top_k, top_p or min_p.
        penalty_capacity: of the penalty tables, which move when it grows; 0: no row is penalised.
    """

    filters: bool = False
    penalty_capacity: int = 0


class Sampler:
    """Sampling state of `R` rows, and of one more that is padding's: greedy, and nothing else.

    Settings live in device tensors, one entry per row, written when a row starts. What few requests ask for
    (bias, penalties, minimum length) is kept by row in small host tables, so that a step without any of
    it pays nothing.
    """

    def __init__(
        self, num_rows: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device
    ) -> None:
        self._device = device
        self._eos = tuple(eos_token_ids)
        # temperature, top_p, min_p, presence, frequency, repetition as bits of float32; top_k. One tensor,
        # for each that a draw picks its rows from is a launch.
        self._words_7R = torch.zeros((7, num_rows + 1), dtype=torch.int32, device=device)
        # seed, row of the penalty tables
        self._ints_2R = torch.zeros((2, num_rows + 1), dtype=torch.int64, device=device)
        self._ints_2R[1] = -1
        self._not_finite = torch.tensor(NOT_FINITE, device=device)
        self._sampling: set[int] = set()  # rows that are not greedy
        self._filtered: set[int] = set()  # rows with top_k, top_p or min_p
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}
        self._min_length: dict[int, tuple[int, Tensor]] = {}  # first position where stopping is allowed
        self._penalties = PenaltyTables(num_rows, vocab_size, device)
        self._narrowing = Narrowing(device)

    def start_rows(self, starts: Sequence[RowStart]) -> None:
        """Writes the settings of rows that begin (again) to serve a request."""
        if not starts:
            return
        for start in starts:
            self._start_host_state(start)
        row = to_device([start.row for start in starts], torch.int64, self._device)
        floats = [
            (
                0.0 if p.greedy else p.temperature, p.top_p, p.min_p,
                p.presence_penalty, p.frequency_penalty, p.repetition_penalty,
            )
            for p in (start.params for start in starts)
        ]  # fmt: skip
        top_k = [max(start.params.top_k, 0) for start in starts]
        ints = [(start.seed, self._penalties.slot(start.row)) for start in starts]
        self._words_7R[:6, row] = to_device(floats, torch.float32, self._device).view(torch.int32).T
        self._words_7R[6, row] = to_device(top_k, torch.int32, self._device)
        self._ints_2R[:, row] = to_device(ints, torch.int64, self._device).T

    def _start_host_state(self, start: RowStart) -> None:
        row, params = start.row, start.params
        filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        _put(self._sampling, row, not params.greedy)
        _put(self._filtered, row, filtered and not params.greedy)
        self._bias.pop(row, None)
        self._min_length.pop(row, None)
        if params.logit_bias:
            ids = to_device(list(params.logit_bias), torch.int64, self._device)
            values = to_device(list(params.logit_bias.values()), torch.float32, self._device)
            self._bias[row] = (ids, values)
        banned = params.ending_ids(self._eos)
        if params.min_tokens and banned:
            ids = to_device(list(banned), torch.int64, self._device)
            self._min_length[row] = (start.prompt_len + params.min_tokens, ids)
        self._penalties.start_row(start)
        self._narrowing.start_row(start)

    def sample(
        self,
        logits_SV: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        row_S: Tensor,
        position_S: Tensor,
        masks: TokenMasks | None = None,
    ) -> Tensor:
        """Draws token_S int64 and counts it; NOT_FINITE or NOTHING_LEFT where a row cannot draw.

        Args:
            logits_SV: fp32, changed in place.
            rows, row_S: the rows, on the host and on the device.
            positions, position_S: the position of each token to be drawn, likewise.
            masks: of the rows under a grammar.
        """
        self._adjust(logits_SV, rows, positions, row_S)
        narrowed = self._narrowing.any(rows)
        if narrowed:
            self._narrowing.apply(logits_SV, rows)
        if masks is not None:
            self._mask(logits_SV, masks)
        most_S = logits_SV.amax(dim=-1)
        token_S = self._draw(
            logits_SV,
            row_S,
            position_S,
            all_greedy=self._sampling.isdisjoint(rows),
            any_filter=not self._filtered.isdisjoint(rows),
        )
        token_S = torch.where(_finite(most_S), token_S, self._not_finite)
        if narrowed or masks is not None:
            token_S.masked_fill_(most_S == -torch.inf, NOTHING_LEFT)
        if self._penalties.any(rows):
            self._penalties.count(self._ints_2R[1, row_S], token_S)
        if narrowed:
            self._narrowing.drawn(rows, token_S)
        return token_S

    def is_plain(self, rows: Sequence[int], positions: Sequence[int]) -> bool:
        """Whether `sample_plain` would do what `sample` does for tokens at these positions."""
        return (
            (not self._bias or self._bias.keys().isdisjoint(rows))
            and not self._narrowing.any(rows)
            and (not self._min_length or not self._too_early(rows, positions))
        )

    def plain_draw(self, rows: Sequence[int]) -> PlainDraw:
        """What `sample_plain` has to do for these rows."""
        capacity = self._penalties.capacity if self._penalties.any(rows) else 0
        return PlainDraw(not self._filtered.isdisjoint(rows), capacity)

    def sample_plain(
        self, logits_SV: Tensor, row_S: Tensor, position_S: Tensor, draw: PlainDraw, told_S: Tensor
    ) -> Tensor:
        """Draws as `sample` does, but never looks at the host's tables: what it launches depends on `draw`
        alone, and can be launched again, as it is, when other such rows are in `row_S`.

        Args:
            told_S: gets what `sample` returns.

        Returns:
            The tokens, and where a row cannot draw any one of the vocabulary.
        """
        finite_S = _finite(logits_SV.amax(dim=-1))
        if draw.penalty_capacity:
            slot_S = self._ints_2R[1, row_S]
            self._penalties.apply(logits_SV, slot_S, self._floats(row_S))
        token_S = self._draw(logits_SV, row_S, position_S, all_greedy=False, any_filter=draw.filters)
        torch.where(finite_S, token_S, self._not_finite, out=told_S)
        if draw.penalty_capacity:
            self._penalties.count(slot_S, token_S)
        return token_S

    def _floats(self, row_S: Tensor) -> Tensor:
        return self._words_7R[:6, row_S].view(torch.float32)

    def _draw(
        self, logits_SV: Tensor, row_S: Tensor, position_S: Tensor, *, all_greedy: bool, any_filter: bool
    ) -> Tensor:
        words = self._words_7R[:, row_S]
        floats = words.view(torch.float32)
        params = api.SampleParams(
            temperature_S=floats[0],
            top_k_S=words[6],
            top_p_S=floats[1],
            min_p_S=floats[2],
            seed_S=self._ints_2R[0, row_S],
            position_S=position_S,
            all_greedy=all_greedy,
            any_filter=any_filter,
        )
        return api.sample(logits_SV, params)

    def _too_early(self, rows: Sequence[int], positions: Sequence[int]) -> bool:
        """Whether any row may not end yet."""
        return any(
            row in self._min_length and position < self._min_length[row][0]
            for row, position in zip(rows, positions, strict=True)
        )

    def _mask(self, logits_SV: Tensor, masks: TokenMasks) -> None:
        words_KW, row_K = torch.from_numpy(masks.words_KW.view(np.int32)), torch.from_numpy(masks.index_K)
        if logits_SV.is_cuda:
            words_KW, row_K = (
                x.pin_memory().to(logits_SV.device, non_blocking=True) for x in (words_KW, row_K)
            )
        api.mask_tokens(logits_SV, words_KW, row_K)

    def changes_logits(self, rows: Sequence[int]) -> bool:
        """Whether `sample` would overwrite the logits of any of these rows."""
        return bool(
            (self._bias and not self._bias.keys().isdisjoint(rows))
            or (self._min_length and not self._min_length.keys().isdisjoint(rows))
            or self._penalties.any(rows)
            or self._narrowing.any(rows)
        )

    def _adjust(
        self, logits_SV: Tensor, rows: Sequence[int], positions: Sequence[int], row_S: Tensor
    ) -> None:
        if self._penalties.any(rows):
            self._penalties.apply(logits_SV, self._ints_2R[1, row_S], self._floats(row_S))
        if not self._bias and not self._min_length:
            return
        for i, row in enumerate(rows):
            if row in self._bias:
                ids, values = self._bias[row]
                logits_SV[i, ids] += values
            if row in self._min_length:
                first, ids = self._min_length[row]
                if positions[i] < first:
                    logits_SV[i, ids] = -torch.inf


def _finite(most_S: Tensor) -> Tensor:
    """Whether rows can be drawn from, by their largest logits: no NaN and no infinity among what may be drawn
    hides from those. `isfinite` is four launches."""
    return most_S * 0 == 0


def _put(rows: set[int], row: int, present: bool) -> None:
    if present:
        rows.add(row)
    else:
        rows.discard(row)
