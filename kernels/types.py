"""The argument bundles of the ops. They know tensors and host integers; not requests.

Shapes are in `kernels/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One flat batch of sequences, those with a single query token first.

    Attributes:
        page_table_SB: int32 block ids; entries past a sequence's last block are never read.
        query_start_S1: int32 [S + 1], exclusive prefix sum of query lengths.
        seq_len_S: int32 context length of each sequence, this step's tokens included.
        num_decodes: how many leading sequences have exactly one query token.
        max_query_len, max_seq_len: host upper bounds, for launch grids and scratch.
    """

    page_table_SB: Tensor
    query_start_S1: Tensor
    seq_len_S: Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How to draw one token per row. Every tensor is [S].

    The draw depends on nothing but the row's logits, `seed_S` and `position_S`: a counter-based generator.

    Attributes:
        temperature_S: fp32; 0 means greedy.
        top_k_S: int32; 0 keeps all.
        top_p_S, min_p_S: fp32; 1.0 and 0.0 keep all.
        seed_S: int64.
        position_S: int64 position of the token being drawn.
        all_greedy: no row samples, so an argmax will do.
        any_filter: some row has top_k, top_p or min_p.
    """

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    seed_S: Tensor
    position_S: Tensor
    all_greedy: bool
    any_filter: bool


@dataclass(frozen=True, slots=True)
class PenaltyParams:
    """What changes the logits before the draw, for rows that ask. `U` rows of persistent state.

    Attributes:
        row_S: int64 row of the state tables, -1 for none.
        output_count_UV: int32, how often each token was generated.
        prompt_seen_UV: bool, whether the token occurs in the prompt.
        presence_S, frequency_S, repetition_S: fp32; 0, 0 and 1 change nothing.
    """

    row_S: Tensor
    output_count_UV: Tensor
    prompt_seen_UV: Tensor
    presence_S: Tensor
    frequency_S: Tensor
    repetition_S: Tensor
