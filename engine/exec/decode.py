"""A decode step on memory that stays where it is: what a CUDA graph is captured of.

    lanes -> decode_inputs -> forward -> logits -> draw -> last_token_R, token_S

Every launch of `run` reads and writes the same addresses, whoever is in the lanes: the lanes, the rows, the
sampler's tables, weights, KV memory, and the tensors made here. `S` sequences, padded; `E` hidden.
It knows nothing of plans, and decides nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.exec.kv_store import KVStore
from engine.exec.rows import Rows
from engine.model.batch import ForwardBatch
from engine.model.transformer import Transformer
from engine.sample.sampler import PlainDraw, Sampler
from kernels import api


class Work(NamedTuple):
    """What one graph does, for how many lanes.

    Attributes:
        draw: how the tokens are drawn; None: the step ends with the hidden states.
        logprobs: their log probabilities too.
    """

    size: int
    draw: PlainDraw | None = PlainDraw()
    logprobs: bool = False

    def __str__(self) -> str:
        if self.draw is None:
            return f"{self.size} sequences, forward only"
        extras = {
            "filters": self.draw.filters,
            "penalties": self.draw.penalty_capacity,
            "log probabilities": self.logprobs,
        }
        return " + ".join([f"{self.size} sequences, draw", *(name for name, on in extras.items() if on)])


class DecodeStep:
    """The step and its memory, for up to `most` sequences. Batches of all sizes share it.

    Attributes:
        token_S, logprob_S: what was drawn, int64 and fp32.
        hidden_SE: what a step that does not draw ends with.
    """

    def __init__(
        self, model: Transformer, kv_store: KVStore, rows: Rows, sampler: Sampler, most: int
    ) -> None:
        self._model = model
        self._kv = kv_store.layers
        self._rows = rows
        self._sampler = sampler
        device = model.device
        self._token_id_S, self._position_S, self._slot_S, self.next_position_S = torch.zeros(
            (4, most), dtype=torch.int64, device=device
        )
        blocks = rows.page_table_RB.shape[1]
        self._seq_len_S = torch.zeros(most, dtype=torch.int32, device=device)
        self._page_table_SB = torch.zeros((most, blocks), dtype=torch.int32, device=device)
        self._query_start_S1 = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.token_S = torch.zeros(most, dtype=torch.int64, device=device)
        self.logprob_S = torch.zeros(most, dtype=torch.float32, device=device)
        self.hidden_SE = torch.zeros((most, model.spec.hidden_size), dtype=model.dtype, device=device)

    def run(self, work: Work, lanes_5S: Tensor) -> None:
        """Launches everything, and waits for nothing."""
        batch = self._inputs(lanes_5S)
        hidden_SE = self._model.forward(batch)
        if work.draw is not None:
            self._draw(work, work.draw, hidden_SE, lanes_5S[0])
        else:
            self.hidden_SE[: work.size].copy_(hidden_SE)

    def _inputs(self, lanes_5S: Tensor) -> ForwardBatch:
        size, rows, block_size = lanes_5S.shape[1], self._rows, self._kv[0].shape[3]
        inputs = api.DecodeInputs(
            self._token_id_S[:size],
            self._position_S[:size],
            self._slot_S[:size],
            self.next_position_S[:size],
            self._seq_len_S[:size],
            self._page_table_SB[:size],
        )
        api.decode_inputs(lanes_5S, rows.last_token_R, rows.page_table_RB, block_size, inputs)
        attention = api.AttentionBatch(
            page_table_SB=inputs.page_table_SB,
            query_start_S1=self._query_start_S1[: size + 1],
            seq_len_S=inputs.seq_len_S,
            num_decodes=size,
            max_query_len=1,
            max_seq_len=self._model.max_model_len,
        )
        return ForwardBatch(inputs.token_id_S, inputs.position_S, inputs.slot_S, attention, self._kv)

    def _draw(self, work: Work, draw: PlainDraw, hidden_SE: Tensor, row_S: Tensor) -> None:
        logits_SV = self._model.logits(hidden_SE)
        as_given_SV = logits_SV.clone() if work.logprobs and draw.penalty_capacity else logits_SV
        position_S = self.next_position_S[: work.size]
        told_S = self.token_S[: work.size]
        token_S = self._sampler.sample_plain(logits_SV, row_S, position_S, draw, told_S)
        self._rows.last_token_R[row_S] = token_S
        if work.logprobs:
            chosen_S, _, _ = api.logprobs(as_given_SV, token_S, 0)
            self.logprob_S[: work.size].copy_(chosen_S)
