"""Repetition, frequency and presence penalties in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.types import PenaltyParams


def penalize(logits_SV: Tensor, params: PenaltyParams) -> None:
    """Changes the logits of tokens already seen, in place; rows with `row_S == -1` stay as they are.

    First repetition (Keskar et al. 2019, CTRL): a token of the prompt or the output has its positive logit
    divided, its negative one multiplied. Then OpenAI's: minus `frequency * count + presence * (count > 0)`,
    which count the output alone.
    """
    asking = torch.nonzero(params.row_S >= 0).squeeze(1)
    if not len(asking):
        return
    row_A = params.row_S[asking]
    count_AV, prompt_AV = params.output_count_UV[row_A], params.prompt_seen_UV[row_A]
    logits_AV = logits_SV[asking]

    repetition_A1 = params.repetition_S[asking][:, None]
    repeated_AV = torch.where(logits_AV > 0, logits_AV / repetition_A1, logits_AV * repetition_A1)
    logits_AV = torch.where((count_AV > 0) | prompt_AV, repeated_AV, logits_AV)
    logits_AV -= params.frequency_S[asking][:, None] * count_AV
    logits_AV -= params.presence_S[asking][:, None] * (count_AV > 0)
    logits_SV[asking] = logits_AV
