"""Hidden states of prompts -> embeddings. One device, no knowledge of requests.

`E` hidden, `T` tokens in the step, `K` vectors that the step completes.

A prompt may come in several steps: what is needed of its earlier tokens is kept by row until it ends. Vectors
are cut and scaled on the host, in fp32, once their copy has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.embedding import VALUE_DTYPE, Pooling, PoolingKind
from engine.plan import RowStart, StepPlan
from engine.transfer import to_host


class PendingEmbeddings:
    """The vectors of one step on their way to the host.

    Args:
        indices: of their sequences in the plan.

    Attributes:
        on_device: a copy is under way.
    """

    def __init__(self, indices: list[int], poolings: list[Pooling], pooled_KE: Tensor) -> None:
        self._indices = indices
        self._poolings = poolings
        self.on_device = pooled_KE.is_cuda
        self._pooled_KE = to_host(pooled_KE)

    def read(self) -> list[tuple[int, bytes]]:
        """The finite ones, scaled to length 1; once the copy has arrived."""
        found = []
        for index, pooling, row in zip(self._indices, self._poolings, self._pooled_KE.numpy(), strict=True):
            vector = row[: pooling.dimensions].astype(np.float64)
            # In fp64 neither a square nor a sum of fp32 numbers overflows.
            length = float(np.sqrt(vector @ vector))
            if np.isfinite(length):
                found.append((index, (vector / (length or 1.0)).astype(VALUE_DTYPE).tobytes()))
        return found


class Pooler:
    """Pools the rows that began with a `pooling`."""

    def __init__(self) -> None:
        self._poolings: dict[int, Pooling] = {}
        self._kept: dict[int, Tensor] = {}  # row -> what its earlier steps left, fp32

    def start_rows(self, starts: Sequence[RowStart]) -> None:
        for start in starts:
            self._poolings.pop(start.row, None)
            self._kept.pop(start.row, None)
            if start.params.pooling is not None:
                self._poolings[start.row] = start.params.pooling

    def reads(self, plan: StepPlan) -> bool:
        """Whether it takes in hidden states of this step."""
        return any(sequence.row in self._poolings for sequence in plan.sequences)

    def pool(self, plan: StepPlan, hidden_TE: Tensor) -> PendingEmbeddings | None:
        """Takes in a step's hidden states; None where it completes no vector."""
        if not self._poolings:
            return None
        indices: list[int] = []
        poolings: list[Pooling] = []
        vectors: list[Tensor] = []
        first = 0
        for index, sequence in enumerate(plan.sequences):
            pooling = self._poolings.get(sequence.row)
            last = first + sequence.num_tokens
            if pooling is not None:
                vector_E = self._take(sequence.row, pooling.kind, hidden_TE[first:last])
                if sequence.embeds:
                    indices.append(index)
                    poolings.append(pooling)
                    vectors.append(vector_E)
                    self._kept.pop(sequence.row, None)
            first = last
        return PendingEmbeddings(indices, poolings, torch.stack(vectors)) if indices else None

    def _take(self, row: int, kind: PoolingKind, chunk_TE: Tensor) -> Tensor:
        """The vector of the row's tokens so far. A mean is left a sum: its length is set anyway."""
        if kind is PoolingKind.LAST:
            return chunk_TE[-1].float()
        kept_E = self._kept.get(row)
        if kind is PoolingKind.CLS:
            vector_E = chunk_TE[0].float() if kept_E is None else kept_E
        else:
            vector_E = chunk_TE.float().sum(0)
            if kept_E is not None:
                vector_E += kept_E
        self._kept[row] = vector_E
        return vector_E
