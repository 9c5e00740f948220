"""Drawing one token per row without a sort and without a softmax. `README.md` defines every step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.types import SampleParams

DRAW_BLOCK = 2048
SEARCH_BLOCK = 4096
MIN_TEMPERATURE = tl.constexpr(1e-6)
INFINITY = tl.constexpr(float("inf"))


def sample(logits_SV: Tensor, params: SampleParams) -> Tensor:
    """Returns int64 token ids `[S]`."""
    rows, vocabulary = logits_SV.shape
    device = logits_SV.device
    draws, filters = not params.all_greedy, not params.all_greedy and params.any_filter
    threshold_S = lowest_kept(logits_SV, params) if filters else params.temperature_S
    block = min(DRAW_BLOCK, triton.next_power_of_2(vocabulary))
    blocks = triton.cdiv(vocabulary, block)
    score_SB = torch.empty((rows, blocks), dtype=torch.float32, device=device)
    token_SB = torch.empty((rows, blocks), dtype=torch.int32, device=device)
    _draw[(rows, blocks)](
        logits_SV,
        params.temperature_S,
        params.seed_S,
        params.position_S,
        threshold_S,
        score_SB,
        token_SB,
        V=vocabulary,
        BLOCK=block,
        DRAWS=draws,
        FILTERS=filters,
        num_warps=4,
    )
    token_S = torch.empty(rows, dtype=torch.int64, device=device)
    _pick[(rows,)](
        score_SB,
        token_SB,
        token_S,
        BLOCKS=blocks,
        V=vocabulary,
        BLOCK=triton.next_power_of_2(blocks),
        num_warps=1,
    )
    return token_S


def lowest_kept(logits_SV: Tensor, params: SampleParams) -> Tensor:
    """Returns the lowest logit that each row's filters keep, fp32 `[S]`; -inf for rows without."""
    rows, vocabulary = logits_SV.shape
    threshold_S = torch.empty(rows, dtype=torch.float32, device=logits_SV.device)
    _thresholds[(rows,)](
        logits_SV,
        params.temperature_S,
        params.top_k_S,
        params.top_p_S,
        params.min_p_S,
        threshold_S,
        V=vocabulary,
        BLOCK=min(SEARCH_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=16,
    )
    return threshold_S


@triton.jit
def _draw(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    threshold_ptr,
    score_ptr,
    token_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    DRAWS: tl.constexpr,
    FILTERS: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    v = first + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + s * V + v, mask=v < V, other=-INFINITY)
    if DRAWS:
        temperature = tl.load(temperature_ptr + s)
        if temperature > 0:
            inverse = tl.div_rn(1.0, tl.maximum(temperature, MIN_TEMPERATURE))
            noise = _gumbel(v, tl.load(seed_ptr + s), tl.load(position_ptr + s))
            score = x * inverse + noise
            if FILTERS:
                score = tl.where(x >= tl.load(threshold_ptr + s), score, -INFINITY)
            x = score
    best, lane = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = s * tl.num_programs(1) + tl.program_id(1)
    tl.store(score_ptr + out, best)
    tl.store(token_ptr + out, first + lane)


@triton.jit
def _pick(score_ptr, token_ptr, out_ptr, BLOCKS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCK)
    score = tl.load(score_ptr + s * BLOCKS + b, mask=b < BLOCKS, other=-INFINITY)
    _, winner = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    # Comparisons with NaN can elect a lane past the end; whatever the logits, an id is within the vocabulary.
    token = tl.load(token_ptr + s * BLOCKS + tl.minimum(winner, BLOCKS - 1))
    tl.store(out_ptr + s, tl.minimum(token, V - 1).to(tl.int64))


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_key(seed, position, KEY: tl.constexpr):
    h = _mix(seed.to(tl.uint32) ^ KEY)
    h = _mix(h ^ (seed >> 32).to(tl.uint32))
    h = _mix(h ^ position.to(tl.uint32))
    return _mix(h ^ (position >> 32).to(tl.uint32))


@triton.jit
def _gumbel(token, seed, position):
    bits = _mix(token.to(tl.uint32) ^ _row_key(seed, position, 0x9E3779B9))
    bits = _mix(bits ^ _row_key(seed, position, 0x85EBCA6B))
    u = tl.minimum(bits.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    # log1p(-u) = log(w) (-u) / (w - 1) with w = 1 - u rounded: the two roundings cancel (Kahan).
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, -tl.log(w) * u / tl.where(w == 1.0, 1.0, 1.0 - w))
    return -tl.log(exponential)


@triton.jit
def _thresholds(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    threshold_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + s * V
    temperature = tl.load(temperature_ptr + s)
    top_k, top_p, min_p = tl.load(top_k_ptr + s), tl.load(top_p_ptr + s), tl.load(min_p_ptr + s)
    by_k, by_p = (top_k > 0) & (top_k < V), top_p < 1
    threshold = -INFINITY
    if (temperature > 0) & (by_k | by_p | (min_p > 0)):
        lowest, highest = _extremes(row_ptr, V, BLOCK)
        scale = 1.4426950408889634 / tl.maximum(temperature, MIN_TEMPERATURE)
        first, last = _order(lowest), _order(highest)
        if highest - highest != 0.0:
            threshold = highest
        else:
            if by_k:
                first = _search(row_ptr, first, last, first, top_k.to(tl.float32), highest, 0.0, V, BLOCK)
            if by_p:
                total = _weight_from(row_ptr, first, highest, scale, V, BLOCK)
                first = _search(row_ptr, first, last, first, top_p * total, highest, scale, V, BLOCK)
            threshold = _value(first)
            if min_p > 0:
                log_min_p = tl.minimum(tl.log(min_p), 0.0)
                threshold = tl.maximum(
                    threshold, highest + tl.maximum(temperature, MIN_TEMPERATURE) * log_min_p
                )
    tl.store(threshold_ptr + s, threshold)


@triton.jit
def _order(x):
    """Maps fp32 to int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _extremes(row_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), INFINITY, tl.float32)
    high = tl.full((BLOCK,), -INFINITY, tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        inside = start + v < V
        x = tl.load(row_ptr + start + v, mask=inside, other=-INFINITY)
        high = tl.maximum(high, x)
        low = tl.where(inside, tl.minimum(low, x), low)
    return tl.min(low, axis=0), tl.max(high, axis=0)


@triton.jit
def _weight_from(row_ptr, first, highest, scale, V: tl.constexpr, BLOCK: tl.constexpr):
    """Sums exp(x / T - m / T) over the logits of order `first` and above."""
    v = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        x = tl.load(row_ptr + start + v, mask=start + v < V, other=-INFINITY)
        total += tl.where(_order(x) >= first, tl.exp2((x - highest) * scale), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _search(row_ptr, low, high, first, target, highest, scale, V: tl.constexpr, BLOCK: tl.constexpr):
    """Finds the highest logit x such that the logits >= x, those below `first` left out, weigh `target`.

    With scale 0 each logit weighs 1 (top-k), else exp(x / T - m / T) (top-p). The answer is in [low, high]
    (orders of logits of the row), which each pass cuts to about a quarter; it stops early when the interval
    holds a single distinct logit, which is usually after half of the 16 passes that 32 bits can need.
    """
    v = tl.arange(0, BLOCK)
    while low < high:
        # 64 bits: the orders of -x and x may lie further apart than int32 reaches.
        span = high.to(tl.int64) - low
        a = (low + span // 4 + 1).to(tl.int32)
        b = (low + span // 2 + 1).to(tl.int32)
        c = (low + 3 * span // 4 + 1).to(tl.int32)
        over_a = tl.zeros((BLOCK,), tl.float32)
        over_b = tl.zeros((BLOCK,), tl.float32)
        over_c = tl.zeros((BLOCK,), tl.float32)
        least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        most = tl.full((BLOCK,), -0x80000000, tl.int32)
        for start in tl.range(0, V, BLOCK, num_stages=3):
            inside = start + v < V
            x = tl.load(row_ptr + start + v, mask=inside, other=-INFINITY)
            order = _order(x)
            # A -inf logit times scale 0 would be NaN.
            exponent = (tl.maximum(x, -3.0e38) - highest) * scale
            weight = tl.where(inside & (order >= first), tl.exp2(exponent), 0.0)
            over_a += tl.where(order >= a, weight, 0.0)
            over_b += tl.where(order >= b, weight, 0.0)
            over_c += tl.where(order >= c, weight, 0.0)
            between = inside & (order >= low) & (order <= high)
            least = tl.minimum(least, tl.where(between, order, 0x7FFFFFFF))
            most = tl.maximum(most, tl.where(between, order, -0x80000000))
        reach_a = tl.sum(over_a, axis=0) >= target
        reach_b = tl.sum(over_b, axis=0) >= target
        reach_c = tl.sum(over_c, axis=0) >= target
        bottom, top = tl.min(least, axis=0), tl.max(most, axis=0)
        low = tl.maximum(tl.where(reach_c, c, tl.where(reach_b, b, tl.where(reach_a, a, low))), bottom)
        high = tl.minimum(
            tl.where(reach_c, high, tl.where(reach_b, c - 1, tl.where(reach_a, b - 1, a - 1))), top
        )
        if bottom == top:
            low = bottom
            high = bottom
    return low
