"""Sequences run through the decoder alone: KV memory and page tables are laid out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.model.batch import ForwardBatch
from engine.model.transformer import Transformer
from kernels.api import AttentionBatch

BLOCK_SIZE = 16
NUM_BLOCKS = 12
# Shuffled, so that a page table read as a range is found out; 0 is for padding.
BLOCK_IDS = [7, 2, 11, 5, 1, 9, 3, 10]


class Sequences:
    """Runs sequences through a model, with KV memory of their own that begins as NaN."""

    def __init__(self, model: Transformer) -> None:
        spec = model.spec
        shape = (NUM_BLOCKS, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        self.model = model
        self.kv = [torch.full(shape, float("nan"), dtype=model.dtype) for _ in range(spec.num_layers)]

    def logits(self, token_ids: Sequence[int], start: int) -> torch.Tensor:
        """Computes tokens from position `start` on; returns logits `[T, V]`."""
        count = len(token_ids)
        table = torch.tensor([BLOCK_IDS], dtype=torch.int32)
        position = torch.arange(start, start + count)
        batch = ForwardBatch(
            token_id_T=torch.tensor(token_ids),
            position_T=position,
            slot_T=table[0].long()[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE,
            attention=AttentionBatch(
                page_table_SB=table,
                query_start_S1=torch.tensor([0, count], dtype=torch.int32),
                seq_len_S=torch.tensor([start + count], dtype=torch.int32),
                num_decodes=int(count == 1),
                max_query_len=count,
                max_seq_len=start + count,
            ),
            kv=self.kv,
        )
        return self.model.logits(self.model.forward(batch))

    def greedy(self, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The likeliest continuation."""
        logits, token_ids = self.logits(prompt_ids, 0), []
        for position in range(len(prompt_ids), len(prompt_ids) + num_tokens):
            token_ids.append(int(logits[-1].argmax()))
            logits = self.logits(token_ids[-1:], position)
        return token_ids
