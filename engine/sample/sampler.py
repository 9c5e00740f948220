"""Draws the next token of each row, batched, on the device. It knows rows and logits; not requests.

Order: penalties, logit bias, minimum length, allowed and banned tokens, grammar -> temperature -> top-k,
top-p, min-p -> draw. The draw depends on the row's seed and the token's position alone, so the same seed
gives the same text in any batch.
Log probabilities are the model's own, before all of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.dist.transfer import to_device, to_host
from engine.plan import NOT_FINITE, NOTHING_LEFT, RowStart, TokenMasks
from engine.sample.narrowing import Narrowing
from engine.types import SamplingParams, TokenLogprob
from kernels import api


class Sampler:
    """Sampling state of `R` rows.

    Settings live in device tensors, one entry per row, written when a row starts. What few requests ask for
    (bias, penalties, minimum length) is kept by row in small host tables, so that a step without any of
    it pays nothing.
    """

    def __init__(
        self, num_rows: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device
    ) -> None:
        self._device = device
        self._eos = tuple(eos_token_ids)
        # float32 columns: temperature, top_p, min_p, presence, frequency, repetition
        self._floats_6R = torch.zeros((6, num_rows), dtype=torch.float32, device=device)
        # int64 columns: top_k, seed, row of the penalty tables
        self._ints_3R = torch.zeros((3, num_rows), dtype=torch.int64, device=device)
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
        ints = [(max(start.params.top_k, 0), start.seed, self._penalties.slot(start.row)) for start in starts]
        self._floats_6R[:, row] = to_device(floats, torch.float32, self._device).T
        self._ints_3R[:, row] = to_device(ints, torch.int64, self._device).T

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
        banned = self._ending_ids(params)
        if params.min_tokens and banned:
            ids = to_device(banned, torch.int64, self._device)
            self._min_length[row] = (start.prompt_len + params.min_tokens, ids)
        self._penalties.start_row(start)
        self._narrowing.start_row(start)

    def _ending_ids(self, params: SamplingParams) -> list[int]:
        return list({*params.stop_token_ids, *(() if params.ignore_eos else self._eos)})

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
        finite_S = torch.isfinite(logits_SV.amax(dim=-1))
        self._adjust(logits_SV, rows, positions, row_S)
        narrowed = self._narrowing.any(rows)
        if narrowed:
            self._narrowing.apply(logits_SV, rows)
        if masks is not None:
            self._mask(logits_SV, masks)
        if narrowed or masks is not None:
            empty_S = logits_SV.amax(dim=-1) == -torch.inf
        floats, ints = self._floats_6R[:, row_S], self._ints_3R[:, row_S]
        params = api.SampleParams(
            temperature_S=floats[0],
            top_k_S=ints[0].to(torch.int32),
            top_p_S=floats[1],
            min_p_S=floats[2],
            seed_S=ints[1],
            position_S=position_S,
            all_greedy=self._sampling.isdisjoint(rows),
            any_filter=not self._filtered.isdisjoint(rows),
        )
        token_S = api.sample(logits_SV, params)
        if narrowed or masks is not None:
            token_S = torch.where(empty_S, NOTHING_LEFT, token_S)
        token_S = torch.where(finite_S, token_S, NOT_FINITE)
        self._penalties.count(rows, token_S)
        if narrowed:
            self._narrowing.drawn(rows, token_S)
        return token_S

    def _mask(self, logits_SV: Tensor, masks: TokenMasks) -> None:
        words_KW = torch.from_numpy(masks.words_KW.view(np.int32))
        if logits_SV.is_cuda:
            words_KW = words_KW.pin_memory().to(logits_SV.device, non_blocking=True)
        api.mask_tokens(logits_SV, words_KW, to_device(masks.indices, torch.int64, logits_SV.device))

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
            floats, slot_S = self._floats_6R[:, row_S], self._ints_3R[2, row_S]
            self._penalties.apply(logits_SV, slot_S, floats)
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

    def count(self, rows: Sequence[int], token_S: Tensor) -> None:
        """Counts the drawn tokens of penalised rows."""
        if not self.any(rows):
            return
        pairs = [(i, self._slot_of_row[row]) for i, row in enumerate(rows) if row in self._slot_of_row]
        index = to_device(pairs, torch.int64, self._device)
        drawn = token_S[index[:, 0]].clamp(min=0)
        self._output_count_UV[index[:, 1], drawn] += 1


class PendingLogprobs:
    """Log probabilities of drawn tokens and their alternatives, launched now and read later.

    Args:
        logits_SV: fp32, as the model gave them.
        token_S: the drawn tokens.
        wanted: per row, how many alternatives (0: only the token's own), or None for rows that did not ask.
    """

    def __init__(self, logits_SV: Tensor, token_S: Tensor, wanted: Sequence[int | None]) -> None:
        self._wanted = wanted
        self._asking = [i for i, count in enumerate(wanted) if count is not None]
        self._host: tuple[Tensor, ...] = ()
        if self._asking:
            most = max(count for count in wanted if count is not None)
            index = to_device(self._asking, torch.int64, logits_SV.device)
            tokens = token_S[index]
            found = api.logprobs(logits_SV[index], tokens.clamp(min=0), most)
            self._host = tuple(to_host(tensor) for tensor in (tokens, *found))

    def read(self) -> list[TokenLogprob | None]:
        """One entry per row, or an empty list when no row asked; the copies must have arrived."""
        if not self._asking:
            return []
        tokens, chosen, ids, values = (tensor.tolist() for tensor in self._host)
        out: list[TokenLogprob | None] = [None] * len(self._wanted)
        for k, i in enumerate(self._asking):
            count = self._wanted[i] or 0
            top = tuple(zip(ids[k][:count], values[k][:count], strict=True))
            out[i] = TokenLogprob(tokens[k], chosen[k], top)
        return out


def _put(rows: set[int], row: int, present: bool) -> None:
    if present:
        rows.add(row)
    else:
        rows.discard(row)
