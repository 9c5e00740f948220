"""Log probabilities of drawn and of likeliest tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def logprobs(logits_SV: Tensor, token_S: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the log probability of each row's token, and the `top` likeliest ids with theirs.

    Returns:
        chosen_S fp32, top_ids_SK int64, top_SK fp32, likeliest first; equal logits come in any order.
    """
    norm_S1 = torch.logsumexp(logits_SV, dim=-1, keepdim=True)
    chosen_S = (logits_SV.gather(1, token_S[:, None]) - norm_S1).squeeze(1)
    top_SK, top_ids_SK = torch.topk(logits_SV, top, dim=-1)
    return chosen_S, top_ids_SK, top_SK - norm_S1
