"""Sampler: what few requests ask for reaches their own row, and no other."""

from __future__ import annotations

from typing import Any

import torch

from engine.plan import NOT_FINITE, NOTHING_LEFT, RowStart
from engine.sample.logprobs import PendingLogprobs
from engine.sample.sampler import PlainDraw, Sampler
from engine.types import SamplingParams

V = 50
EOS = 7


def make(*starts: RowStart) -> Sampler:
    sampler = Sampler(8, V, [EOS], torch.device("cpu"))
    sampler.start_rows(starts)
    return sampler


def start(
    row: int, *, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **params: Any
) -> RowStart:
    chosen = SamplingParams(**{"temperature": 0.0, **params})
    return RowStart(row, chosen, params.get("seed", 0), len(prompt), prompt + output, ())


def draw(sampler: Sampler, rows: list[int], positions: list[int], logits_SV: torch.Tensor) -> list[int]:
    row_S, position_S = torch.tensor(rows), torch.tensor(positions)
    return sampler.sample(logits_SV.clone(), rows, positions, row_S, position_S).tolist()


def preferring(*token_ids: int) -> torch.Tensor:
    """One row that likes these tokens, the first the most."""
    logits_SV = torch.zeros(1, V)
    for rank, token_id in enumerate(token_ids):
        logits_SV[0, token_id] = 10.0 - rank
    return logits_SV


def test_logit_bias_moves_its_row_alone() -> None:
    sampler = make(start(0, logit_bias={4: 5.0, 3: -100.0}), start(1))
    both = preferring(3, 4).repeat(2, 1)
    assert draw(sampler, [0, 1], [2, 2], both) == [4, 3]


def test_no_end_before_min_tokens() -> None:
    sampler = make(start(0, min_tokens=2, stop_token_ids=(9,)))
    logits_SV = preferring(EOS, 9, 5)
    # The prompt has 2 tokens, so positions 2 and 3 are the first two to be drawn.
    assert [draw(sampler, [0], [p], logits_SV)[0] for p in (2, 3, 4)] == [5, 5, EOS]


def test_penalties_count_what_was_generated() -> None:
    sampler = make(start(0, presence_penalty=1.5), start(1))
    logits_SV = preferring(3, 4).repeat(2, 1)
    assert draw(sampler, [0, 1], [2, 2], logits_SV) == [3, 3]
    assert draw(sampler, [0, 1], [3, 3], logits_SV) == [4, 3]


def test_penalties_survive_a_preemption() -> None:
    sampler = make(start(0, presence_penalty=1.5))
    sampler.start_rows([start(5, output=(3,), presence_penalty=1.5)])
    assert draw(sampler, [5], [3], preferring(3, 4)) == [4]


def test_repetition_penalty_sees_the_prompt() -> None:
    sampler = make(start(0, prompt=(3, 3), repetition_penalty=2.0))
    assert draw(sampler, [0], [2], preferring(3, 4)) == [4]


def test_many_penalised_rows_grow_the_tables() -> None:
    sampler = make(*(start(row, output=(row + 10,), presence_penalty=2.0) for row in range(8)))
    logits_SV = torch.cat([preferring(row + 10, 40) - 8.5 for row in range(8)])
    assert draw(sampler, list(range(8)), [3] * 8, logits_SV) == [40] * 8


def test_a_row_that_starts_again_forgets_the_last_request() -> None:
    sampler = make(start(0, logit_bias={4: 50.0}, min_tokens=9, presence_penalty=2.0, temperature=1.5))
    sampler.start_rows([start(0)])
    assert draw(sampler, [0], [2], preferring(EOS, 4)) == [EOS]
    assert not sampler.changes_logits([0])


def test_logits_that_are_not_finite_end_their_row_alone() -> None:
    sampler = make(start(0), start(1, temperature=1.0, seed=3), start(2, temperature=1.0))
    logits_SV = preferring(3).repeat(3, 1)
    healthy = draw(sampler, [0, 1, 2], [2, 2, 2], logits_SV)
    logits_SV[0, 9], logits_SV[2, 1] = torch.nan, torch.inf
    broken = draw(sampler, [0, 1, 2], [2, 2, 2], logits_SV)
    assert (broken[0], broken[2]) == (-1, -1)
    assert broken[1] == healthy[1]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    flat = torch.zeros(1, V)
    alone = draw(make(start(0, temperature=1.0, seed=42)), [0], [9], flat)
    crowd = make(*(start(row, temperature=1.0, seed=row, top_k=5) for row in range(5)))
    crowd.start_rows([start(6, temperature=1.0, seed=42)])
    together = draw(crowd, [0, 3, 6, 1], [9, 4, 9, 2], flat.repeat(4, 1))
    assert together[2] == alone[0]
    other = draw(make(start(0, temperature=1.0, seed=42)), [0], [10], flat)
    assert other != alone


def test_logprobs_come_for_rows_that_ask() -> None:
    logits_SV = torch.cat([preferring(3, 4), preferring(5, 6)])
    assert PendingLogprobs.launch(logits_SV, torch.tensor([3, 5]), [None, None]).read() == []
    first, second = PendingLogprobs.launch(logits_SV, torch.tensor([4, 5]), [None, 2]).read()
    assert first is None
    assert second is not None
    expected = logits_SV.log_softmax(-1)[1]
    assert second.token_id == 5
    assert abs(second.logprob - expected[5].item()) < 1e-5
    assert [token_id for token_id, _ in second.top] == [5, 6]


def test_only_allowed_tokens_are_drawn() -> None:
    sampler = make(start(0, allowed_token_ids=(8, 5)), start(1))
    both = preferring(3, 4, 5).repeat(2, 1)
    assert draw(sampler, [0, 1], [2, 2], both) == [5, 3]
    sampler.start_rows([start(0)])
    assert draw(sampler, [0], [2], preferring(3)) == [3], "the row's next request is free again"


def test_nothing_is_left_where_the_allowed_may_not_be_drawn() -> None:
    sampler = make(start(0, allowed_token_ids=(EOS,), min_tokens=3), start(1))
    assert draw(sampler, [0, 1], [2, 2], preferring(3).repeat(2, 1)) == [NOTHING_LEFT, 3]


def test_banned_sequences_are_not_completed() -> None:
    sampler = make(start(0, banned_sequences=((3, 4), (9,), (5, 3, 6))), start(1))

    def step(position: int, *liked: int) -> list[int]:
        return draw(sampler, [0, 1], [position] * 2, preferring(*liked).repeat(2, 1))

    assert step(2, 4, 3) == [4, 4], "the prompt does not count, nor the end of a sequence alone"
    assert step(3, 9, 3) == [3, 9], "a single token is always banned"
    assert step(4, 4, 5) == [5, 4]
    assert step(5, 3) == [3, 3]
    assert step(6, 6, 4, 8) == [8, 6], "two sequences end here"
    assert step(7, 6, 4) == [6, 6], "and a step later none"


def test_banned_sequences_survive_a_preemption() -> None:
    sampler = make(start(0, banned_sequences=((1, 3, 4),)))
    sampler.start_rows([start(5, prompt=(1, 3), output=(1, 3), banned_sequences=((1, 3, 4),))])
    assert draw(sampler, [5], [4], preferring(4, 2)) == [2]
    sampler.start_rows([start(5, prompt=(1, 3), banned_sequences=((1, 3, 4),))])
    assert draw(sampler, [5], [2], preferring(4, 2)) == [4]


def test_log_probabilities_are_read_before_tokens_are_taken_away() -> None:
    for params in ({"allowed_token_ids": (1,)}, {"banned_sequences": ((1,),)}):
        assert make(start(0, **params)).changes_logits([0])
    assert not make(start(0)).changes_logits([0])


def test_a_plain_draw_tells_of_rows_that_are_not_finite_and_has_tokens_for_them() -> None:
    sampler = make(*(start(row, temperature=1.0, top_k=3 + row, seed=row) for row in range(5)))
    logits_SV = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    logits_SV[1, 9], logits_SV[2, 1], logits_SV[3, :] = torch.nan, torch.inf, -torch.inf
    rows, positions = [0, 1, 2, 3, 4], [7] * 5
    row_S, position_S, told_S = torch.tensor(rows), torch.tensor(positions), torch.empty(5, dtype=torch.int64)
    want = draw(sampler, rows, positions, logits_SV)
    token_S = sampler.sample_plain(logits_SV, row_S, position_S, PlainDraw(filters=True), told_S)
    assert told_S.tolist() == want == [want[0], NOT_FINITE, NOT_FINITE, NOT_FINITE, want[4]]
    assert token_S[[0, 4]].tolist() == [want[0], want[4]]
    assert ((token_S >= 0) & (token_S < V)).all()
