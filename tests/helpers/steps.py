"""A model over KV memory of its own, driven step by step without an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.batch import ForwardBatch
from engine.model.transformer import Transformer
from kernels import api

P = 32
Part = tuple[int, int, list[int]]  # which sequence, the position of its first token, its tokens


class Memory:
    """KV memory in which sequence i owns blocks 4i + 1 to 4i + 4."""

    def __init__(self, model: Transformer) -> None:
        spec = model.spec
        shape = (32, 2, spec.num_kv_heads, P, spec.head_dim)
        self.model = model
        self.kv = [torch.zeros(shape, dtype=model.dtype) for _ in range(spec.num_layers)]

    def logits(self, *parts: Part) -> list[Tensor]:
        """Computes one batch, single tokens first; the logits of each part's tokens."""
        counts = [len(tokens) for _, _, tokens in parts]
        with torch.inference_mode():
            return list(self.model.logits(self.model.forward(self._batch(parts))).split(counts))

    def last_logits(self, *parts: Part, of: Sequence[int]) -> Tensor:
        """Computes one batch; the logits of the last tokens of some parts, which alone are wanted."""
        batch, index_W = self._batch(parts), torch.tensor(of, dtype=torch.int64)
        every = batch.attention
        alone = api.AttentionBatch(
            every.page_table_SB[index_W],
            torch.arange(len(of) + 1).int(),
            every.seq_len_S[index_W],
            len(of),
            1,
            every.max_seq_len,
        )
        last_W = every.query_start_S1[1:][index_W].long() - 1
        batch = dataclasses.replace(batch, wanted=api.WantedTokens(last_W, alone))
        with torch.inference_mode():
            return self.model.logits(self.model.forward(batch))

    def _batch(self, parts: Sequence[Part]) -> ForwardBatch:
        counts = [len(tokens) for _, _, tokens in parts]
        position = [first + i for _, first, tokens in parts for i in range(len(tokens))]
        owner = [s for s, _, tokens in parts for _ in tokens]
        slot = [(4 * s + 1) * P + p for s, p in zip(owner, position, strict=True)]
        ends = [first + len(tokens) for _, first, tokens in parts]
        attention = api.AttentionBatch(
            torch.tensor([[4 * s + i for i in range(1, 5)] for s, _, _ in parts]).int(),
            torch.tensor([0, *counts]).cumsum(0).int(),
            torch.tensor(ends).int(),
            sum(count == 1 for count in counts),
            max(counts),
            max(ends),
        )
        ids = torch.tensor([token for _, _, tokens in parts for token in tokens])
        return ForwardBatch(ids, torch.tensor(position), torch.tensor(slot), attention, self.kv)
