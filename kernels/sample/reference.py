"""Drawing one token per row in plain torch; also defines the noise every backend must reproduce.

The order is temperature, top-k, top-p, min-p, draw; `README.md` states each step to the bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.types import SampleParams

MIN_TEMPERATURE = 1e-6
KEYS = (0x9E3779B9, 0x85EBCA6B)
_MASK = 0xFFFFFFFF


def sample(logits_SV: Tensor, params: SampleParams) -> Tensor:
    """Returns int64 token ids `[S]`: the argmax of `logit / temperature + Gumbel noise` over kept tokens.

    Rows of temperature 0 take the plain argmax. Ties go to the lowest id.
    """
    token_S = logits_SV.argmax(-1)
    if params.all_greedy:
        return token_S
    knobs = zip(
        params.temperature_S.tolist(),
        params.top_k_S.tolist(),
        params.top_p_S.tolist(),
        params.min_p_S.tolist(),
        strict=True,
    )
    # Row by row: a row's temporaries fit in cache, which makes this several times faster than [S, V] ones.
    for s, (temperature, top_k, top_p, min_p) in enumerate(knobs):
        if temperature <= 0:
            continue
        logits_V = logits_SV[s]
        temperature = max(temperature, MIN_TEMPERATURE)
        score_V = logits_V * (1.0 / temperature)
        score_V += gumbel_noise(params.seed_S[s], params.position_S[s], logits_V.shape[0])
        if params.any_filter:
            threshold = lowest_kept(logits_V, temperature, top_k, top_p, min_p)
            score_V.masked_fill_(logits_V < threshold, float("-inf"))
        token_S[s] = score_V.argmax()
    return token_S


def lowest_kept(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Returns the lowest logit that the filters keep, as a scalar tensor; equal logits stay together."""
    highest = logits_V.max()
    if not highest.isfinite():
        return highest
    threshold = torch.full_like(highest, float("-inf"))
    if 0 < top_k < logits_V.shape[0]:
        threshold = logits_V.topk(top_k).values[-1]
    if top_p < 1:
        kept_K = logits_V[logits_V >= threshold].sort(descending=True).values
        mass_K = ((kept_K - highest) / temperature).double().softmax(0)
        # A token stays while those likelier than it weigh less than top_p: the first one always does.
        above_K = mass_K.cumsum(0) - mass_K
        threshold = kept_K[max(int((above_K < top_p).sum()), 1) - 1]
    if min_p > 0:
        threshold = torch.maximum(threshold, highest + temperature * min(math.log(min_p), 0.0))
    return threshold


def gumbel_noise(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Returns the fp32 Gumbel noise `[V]` of one row, a function of (seed, position, token id) alone."""
    words = (seed & _MASK, (seed >> 32) & _MASK, position & _MASK, (position >> 32) & _MASK)
    bits_V = torch.arange(vocabulary, device=seed.device)
    for key in KEYS:
        row_key = torch.full_like(seed, key)
        for word in words:
            row_key = _mix(row_key ^ word)
        bits_V = _mix(bits_V ^ row_key)
    # Strictly inside (0, 1), and finest near 0, where the largest noise comes from.
    uniform_V = (bits_V.float() * 2.0**-32 + 2.0**-33).clamp_(max=1 - 2.0**-24)
    exponential_V = uniform_V.neg_().log1p_().neg_()
    return exponential_V.log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """Mixes uint32 values held in int64 (the `lowbias32` finaliser of C. Wellons' hash prospector)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x ^= x >> 15
    x = (x * 0x846CA68B) & _MASK
    x ^= x >> 16
    return x
