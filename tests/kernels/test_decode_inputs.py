"""The inputs of a decode step: Triton against torch, torch against one lane at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import api
from kernels.decode_inputs import reference
from kernels.types import DecodeInputs

P, B, ROWS = 4, 300, 6
PADDING = ROWS - 1
# (row, position, token, column, block): the first token of a new block, one amid a block, one that the host
# knows, a block ahead of its time, a long context.
LANES = [(3, 8, -1, 2, 77), (0, 5, -1, -1, 0), (1, 0, 7, 0, 9), (2, 2, -1, 1, 50), (4, 1163, 0, -1, 0)]
PADDED = [*LANES, *[(PADDING, -1, -1, -1, 0)] * 3]


def outputs(lanes: int, device: str = "cpu") -> DecodeInputs:
    ids = [torch.full((lanes,), -9, dtype=torch.int64, device=device) for _ in range(4)]
    length_S = torch.full((lanes,), -9, dtype=torch.int32, device=device)
    return DecodeInputs(*ids, length_S, torch.full((lanes, B), -9, dtype=torch.int32, device=device))


def tables(device: str = "cpu") -> tuple[Tensor, Tensor]:
    table_RB = torch.arange(1, ROWS * B + 1, dtype=torch.int32).view(ROWS, B)
    table_RB[PADDING] = 0
    return torch.arange(100, 100 + ROWS).to(device), table_RB.to(device)


def lanes_of(lanes: list[tuple[int, ...]], device: str = "cpu") -> Tensor:
    return torch.tensor(lanes).T.contiguous().to(device)


def check(out: DecodeInputs, lanes_5S: Tensor, table_RB: Tensor) -> None:
    """Against the definition, one lane at a time."""
    last_token_R, before_RB = tables()
    table_RB = table_RB.cpu()
    for s, (row, position, token, column, block) in enumerate(PADDED):
        real = position >= 0
        if column >= 0:
            before_RB[row, column] = block
        assert out.token_id_S[s] == (token if token >= 0 else last_token_R[row])
        assert out.position_S[s] == max(position, 0)
        assert out.slot_S[s] == (int(before_RB[row, position // P]) * P + position % P if real else -1)
        assert out.next_position_S[s] == out.seq_len_S[s] == position + 1
        used = -(-(position + 1) // P)
        assert torch.equal(out.page_table_SB[s, :used].cpu(), before_RB[row, :used])
        assert lanes_5S[:, s].tolist() == [row, position + real, -1, column, block]
    assert torch.equal(table_RB, before_RB), "the tables get the new blocks, and nothing else"


def test_the_reference_does_what_the_readme_says() -> None:
    lanes_5S, out = lanes_of(PADDED), outputs(len(PADDED))
    last_token_R, table_RB = tables()
    api.decode_inputs(lanes_5S, last_token_R, table_RB, P, out)
    check(out, lanes_5S, table_RB)


def test_triton_does_too(device: str) -> None:
    from kernels.decode_inputs import triton

    lanes_5S, out = lanes_of(PADDED, device), outputs(len(PADDED), device)
    last_token_R, table_RB = tables(device)
    triton.decode_inputs(lanes_5S, last_token_R, table_RB, P, out)
    check(out, lanes_5S, table_RB)


def test_steps_without_news_follow_each_other() -> None:
    lanes_5S, out = lanes_of(PADDED), outputs(len(PADDED))
    last_token_R, table_RB = tables()
    for step in range(3):
        reference.decode_inputs(lanes_5S, last_token_R, table_RB, P, out)
        assert out.position_S[:5].tolist() == [position + step for _, position, *_ in LANES]
        assert out.position_S[5:].tolist() == [0, 0, 0]
        assert out.slot_S[5:].tolist() == [-1, -1, -1]
    assert table_RB[PADDING].count_nonzero() == 0


def test_wrong_lanes_are_refused() -> None:
    last_token_R, table_RB = tables()
    with pytest.raises(ValueError, match=r"lanes must be int64 \[5, S\]"):
        api.decode_inputs(lanes_of(PADDED)[:3], last_token_R, table_RB, P, outputs(8))
    with pytest.raises(ValueError, match="whole page table"):
        api.decode_inputs(lanes_of(PADDED), last_token_R, table_RB, P, outputs(4))
