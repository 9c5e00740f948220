"""StepPlan -> tensors, against the same arithmetic done one token at a time."""

from __future__ import annotations

import torch

from engine.exec import batch
from engine.exec.rows import Rows
from engine.plan import RowStart, SequencePlan, StepPlan
from engine.types import SamplingParams

P = 4  # tokens per block
KV = [torch.zeros(40, 2, 1, P, 8)]


def row_start(row: int, block_ids: tuple[int, ...]) -> RowStart:
    return RowStart(row, SamplingParams(), 0, 1, (1,), block_ids)


def test_decodes_chunks_and_last_tokens() -> None:
    rows = Rows(num_rows=4, max_blocks=8, device=torch.device("cpu"))
    rows.last_token_R[2] = 77
    plan = StepPlan(
        step=1,
        row_starts=(row_start(2, (5, 9, 11)), row_start(0, (3, 30)), row_start(3, ())),
        sequences=(
            SequencePlan(2, 9, 1, (), (), True),  # its token is on the device only
            SequencePlan(0, 8, 1, (41,), (31,), True),
            SequencePlan(3, 0, 6, (1, 2, 3, 4, 5, 6), (20, 22), False),
        ),
    )
    rows.start(plan)
    rows.append(plan)
    tensors = batch.build(plan, rows, KV)
    forward, attention = tensors.forward, tensors.forward.attention

    assert forward.token_id_T.tolist() == [77, 41, 1, 2, 3, 4, 5, 6]
    assert forward.position_T.tolist() == [9, 8, 0, 1, 2, 3, 4, 5]
    tables = {2: (5, 9, 11), 0: (3, 30, 31), 3: (20, 22)}
    where = [(2, 9), (0, 8), *((3, i) for i in range(6))]
    assert forward.slot_T.tolist() == [tables[row][p // P] * P + p % P for row, p in where]
    assert attention.query_start_S1.tolist() == [0, 1, 2, 8]
    assert attention.seq_len_S.tolist() == [10, 9, 6]
    assert attention.page_table_SB[:, :2].tolist() == [[5, 9], [3, 30], [20, 22]]
    assert (attention.num_decodes, attention.max_query_len, attention.max_seq_len) == (2, 6, 10)
    assert tensors.sample_index.tolist() == [0, 1]
    assert tensors.sample_row.tolist() == [2, 0]
    assert tensors.sample_position.tolist() == [10, 9]

    assert forward.wanted is None
    wanted = batch.build(plan, rows, KV, all_hidden=False).forward.wanted
    assert wanted is not None and wanted.index_W.tolist() == [0, 1]
    assert wanted.attention.page_table_SB[:, :2].tolist() == [[5, 9], [3, 30]]
    assert wanted.attention.query_start_S1.tolist() == [0, 1, 2]
    assert wanted.attention.seq_len_S.tolist() == [10, 9]
    # Of a step that samples from every token nothing is to be left out.
    decodes = plan._replace(sequences=plan.sequences[:2], row_starts=())
    assert batch.build(decodes, rows, KV, all_hidden=False).forward.wanted is None


def test_a_row_that_starts_again_forgets_its_old_page_table() -> None:
    rows = Rows(num_rows=1, max_blocks=8, device=torch.device("cpu"))
    rows.start(StepPlan(1, (), (row_start(0, (7, 8, 9)),)))
    sequence = SequencePlan(0, 4, 1, (1,), (13,), True)
    plan = StepPlan(2, (sequence,), (row_start(0, (12,)),))
    rows.start(plan)
    rows.append(plan)
    assert rows.page_table_RB[0, :2].tolist() == [12, 13]
