"""`--deterministic`: a sequence's logits are the same bits alone and in any batch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import assemble, random_weights, read_spec
from engine.config import Quantization
from kernels.native import library as native
from tests.helpers.steps import Memory, Part

LEVELS = native.levels()[-1:]


@pytest.mark.skipif(not LEVELS, reason="needs the native library")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alone_in_a_batch_and_in_chunks(dtype: torch.dtype, quantization: str | None, level: str) -> None:
    asked = Quantization.parse(quantization) if quantization else None
    with native.using(level, 2):
        spec = read_spec("tiny")
        model = assemble(spec, random_weights(spec, dtype=dtype, device=torch.device("cpu")), 128, asked)
        prompt = [(37 * i + 11) % 199 for i in range(97)]
        others: list[Part] = [
            (s, 0, [(s * i + 3) % 150 for i in range(n)]) for s, n in enumerate((5, 64, 33, 17), 1)
        ]
        alone = Memory(model)
        [whole] = alone.logits((0, 0, prompt))
        [next_token] = alone.logits((0, 97, [7]))

        crowd = Memory(model)
        assert torch.equal(crowd.logits(*others, (0, 0, prompt))[-1], whole)
        steps: list[Part] = [(s, len(tokens), [9]) for s, _, tokens in others]
        assert torch.equal(crowd.logits(*steps[:2], (0, 97, [7]), *steps[2:])[2], next_token)

        chunks = Memory(model)
        cut = [(0, 40), (40, 41), (41, 97)]
        rows = [chunks.logits((0, begin, prompt[begin:end]))[0] for begin, end in cut]
        assert torch.equal(torch.cat(rows), whole)
