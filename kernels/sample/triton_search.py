"""The lowest logit that each row's filters keep, by search: a program per row, or several where rows are few.

Logits map to integers of the same order. A pass over the row counts (top-k) or weighs (top-p) what lies above
pivots within an interval that holds the answer, and so narrows it. Weights are integers too, so that a sum
does not depend on who adds up which part: both searches find the same bits, whatever the batch.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.types import SampleParams

ROW_BLOCK = 4096
PART_BLOCK = 1024
# Programs to aim for where a row has several: about two for each SM of a large GPU.
PROGRAMS = 264
MIN_PARTS = 4
# Read one number at a time. Batches of other sizes align them otherwise, which is no reason to compile again.
COLUMNS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"]
PASSES = 11  # an eighth of the interval is left each time, of at most 2^32
MIN_TEMPERATURE = tl.constexpr(1e-6)
INFINITY = tl.constexpr(float("inf"))
ONE = tl.constexpr(float(1 << 40))  # the weight of the likeliest token


def lowest_kept(logits_SV: Tensor, params: SampleParams, parts: int | None = None) -> Tensor:
    """Returns the lowest logit that each row's filters keep, fp32 `[S]`; -inf for rows without.

    Args:
        parts: programs for each row, chosen by the number of rows if not given.
    """
    rows, vocabulary = logits_SV.shape
    if parts is None:
        parts = min(PROGRAMS // rows, triton.cdiv(vocabulary, 4 * PART_BLOCK))
        # In powers of two: each number of parts is five kernels to compile.
        parts = 1 << (max(1, parts).bit_length() - 1)
    threshold_S = torch.empty(rows, dtype=torch.float32, device=logits_SV.device)
    if parts >= MIN_PARTS:
        _search_in_parts(logits_SV, params, parts, threshold_S)
        return threshold_S
    _thresholds[(rows,)](
        logits_SV,
        params.temperature_S,
        params.top_k_S,
        params.top_p_S,
        params.min_p_S,
        threshold_S,
        V=vocabulary,
        BLOCK=min(ROW_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=16,
    )
    return threshold_S


def _search_in_parts(logits_SV: Tensor, params: SampleParams, parts: int, threshold_S: Tensor) -> None:
    """A launch for each pass: how a row's interval narrows is worked out by each of its programs again."""
    rows, vocabulary = logits_SV.shape
    device = logits_SV.device
    block = min(PART_BLOCK, triton.next_power_of_2(triton.cdiv(vocabulary, parts)))
    share = triton.cdiv(triton.cdiv(vocabulary, parts), block) * block  # whole blocks: aligned reads
    parts = triton.cdiv(vocabulary, share)
    # Of each row: low, high, lower bound of the stage, total weight, order of the highest logit. Passes take
    # turns with two copies: one is read while the other is written.
    states = torch.empty((2, rows, 8), dtype=torch.int64, device=device)
    # Of each part: its weight from `low` and from seven pivots on; least and greatest within the interval.
    sums = torch.empty((2, rows, parts, 8), dtype=torch.int64, device=device)
    bounds = torch.empty((2, rows, parts, 2), dtype=torch.int32, device=device)
    stages = [0, *[1] * (PASSES - 1), 2, *[3] * (PASSES - 1), 4]
    constants = {
        "V": vocabulary,
        "PARTS": parts,
        "BLOCK_PARTS": triton.next_power_of_2(parts),
        "SHARE": share,
        "BLOCK": block,
        "num_warps": 8,
    }
    _survey[(rows, parts)](logits_SV, bounds[1], **constants)
    for number, stage in enumerate(stages):
        new, old = number % 2, 1 - number % 2
        _narrow[(rows, 1 if stage == 4 else parts)](
            logits_SV,
            params.temperature_S,
            params.top_k_S,
            params.top_p_S,
            params.min_p_S,
            states[old],
            sums[old],
            bounds[old],
            states[new],
            sums[new],
            bounds[new],
            threshold_S,
            STAGE=stage,
            **constants,
        )


@triton.jit
def _survey(
    logits_ptr,
    bounds_ptr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least and the greatest order of each part."""
    s, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = tl.arange(0, BLOCK)
    least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    most = tl.full((BLOCK,), -0x80000000, tl.int32)
    for start in range(part * SHARE, part * SHARE + SHARE, BLOCK):
        inside = start + v < V
        order = _order(tl.load(logits_ptr + s * V + start + v, mask=inside, other=0.0))
        least = tl.where(inside, tl.minimum(least, order), least)
        most = tl.where(inside, tl.maximum(most, order), most)
    tl.store(bounds_ptr + (s * PARTS + part) * 2, tl.min(least, axis=0))
    tl.store(bounds_ptr + (s * PARTS + part) * 2 + 1, tl.max(most, axis=0))


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
def _narrow(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    state_ptr,
    sums_ptr,
    bounds_ptr,
    new_state_ptr,
    new_sums_ptr,
    new_bounds_ptr,
    threshold_ptr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGE: tl.constexpr,
):
    """One pass. Stages: 0 and 1 top-k, its first pass and the others; 2 and 3 top-p; 4 the result."""
    s, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.maximum(tl.load(temperature_ptr + s), MIN_TEMPERATURE)
    samples = tl.load(temperature_ptr + s) > 0
    top_k, top_p = tl.load(top_k_ptr + s), tl.load(top_p_ptr + s)
    by_k, by_p = samples & (top_k > 0) & (top_k < V), samples & (top_p < 1)

    # What the pass before has found.
    lane, j = tl.arange(0, BLOCK_PARTS), tl.arange(0, 8)
    at = s * PARTS + lane
    bottom = tl.min(tl.load(bounds_ptr + at * 2, mask=lane < PARTS, other=0x7FFFFFFF), axis=0)
    top = tl.max(tl.load(bounds_ptr + at * 2 + 1, mask=lane < PARTS, other=-0x80000000), axis=0)
    low, high, first, total, highest = bottom, top, bottom, tl.zeros((), tl.int64), top
    if STAGE > 0:
        old_ptr = state_ptr + s * 8
        low, high = tl.load(old_ptr).to(tl.int32), tl.load(old_ptr + 1).to(tl.int32)
        first, total = tl.load(old_ptr + 2).to(tl.int32), tl.load(old_ptr + 3)
        highest = tl.load(old_ptr + 4).to(tl.int32)
        if low < high:
            mask = (lane < PARTS)[:, None] & (j < 8)[None, :]
            over = tl.sum(tl.load(sums_ptr + at[:, None] * 8 + j[None, :], mask=mask, other=0), axis=0)
            weight_from_low = tl.sum(tl.where(j == 0, over, 0), axis=0)
            # The first pass of top-p began at the lower bound: what it weighed is all there is.
            total = tl.where(total > 0, total, weight_from_low)
            target = top_k.to(tl.int64)
            if STAGE > 2:
                target = _share_of(top_p, total)
            low, high = _cut(low, high, bottom, top, over, target, j)
    if STAGE == 2:
        first = tl.where(by_k, low, first)
        low, high, total = first, highest, tl.zeros((), tl.int64)
    highest_logit = _value(highest)
    finite = highest_logit - highest_logit == 0.0
    wanted = by_k
    if STAGE >= 2:
        wanted = by_p
    high = tl.where(wanted & finite, high, low)

    if STAGE == 4:
        kept = tl.where(by_p, low, tl.where(by_k, first, -0x80000000))
        threshold = tl.where(by_k | by_p, _value(kept), -INFINITY)
        min_p = tl.load(min_p_ptr + s)
        if samples & (min_p > 0):
            least = highest_logit + temperature * tl.minimum(tl.log(min_p), 0.0)
            threshold = tl.maximum(threshold, least)
        filters = samples & (by_k | by_p | (min_p > 0))
        tl.store(threshold_ptr + s, tl.where(filters & (finite == 0), highest_logit, threshold))
    else:
        if part == 0:
            new_ptr = new_state_ptr + s * 8
            tl.store(new_ptr, low.to(tl.int64))
            tl.store(new_ptr + 1, high.to(tl.int64))
            tl.store(new_ptr + 2, first.to(tl.int64))
            tl.store(new_ptr + 3, total)
            tl.store(new_ptr + 4, highest.to(tl.int64))
        if low < high:
            _weigh(
                logits_ptr + s * V,
                new_sums_ptr + (s * PARTS + part) * 8,
                new_bounds_ptr + (s * PARTS + part) * 2,
                part * SHARE,
                low,
                high,
                first,
                highest_logit,
                1.4426950408889634 / temperature,
                V,
                SHARE,
                BLOCK,
                STAGE >= 2,
            )


@triton.jit
def _cut(low, high, bottom, top, over, target, j):
    """The part of the interval that holds the answer, by the weights from `low` and seven pivots on."""
    pivot = _pivots(low, high, j)
    reached = over >= target
    new_low = tl.max(tl.where(reached & (j > 0), pivot, low), axis=0)
    new_high = tl.min(tl.where(reached | (j == 0), high, pivot - 1), axis=0)
    new_low, new_high = tl.maximum(new_low, bottom), tl.minimum(new_high, top)
    only = bottom == top
    return tl.where(only, bottom, new_low), tl.where(only, bottom, new_high)


@triton.jit
def _pivots(low, high, j):
    """Entry 0 is `low`, the others cut (low, high] in eighths. 64 bits: orders of -x and x may lie further
    apart than int32 reaches."""
    span = high.to(tl.int64) - low
    return tl.where(j == 0, low, low + (span * j) // 8 + 1).to(tl.int32)


@triton.jit
def _weigh(
    row_ptr,
    sums_ptr,
    bounds_ptr,
    begin,
    low,
    high,
    first,
    highest,
    scale,
    V: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    v, j = tl.arange(0, BLOCK), tl.arange(0, 8)
    pivot = _pivots(low, high, j)
    over = tl.zeros((8,), tl.int64)
    least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    most = tl.full((BLOCK,), -0x80000000, tl.int32)
    for start in range(begin, begin + SHARE, BLOCK):
        inside = start + v < V
        x = tl.load(row_ptr + start + v, mask=inside, other=-INFINITY)
        order = _order(x)
        weight = _weight(x, highest, scale, inside & (order >= first), BY_MASS)
        over += tl.sum(tl.where(order[:, None] >= pivot[None, :], weight[:, None], 0), axis=0)
        between = inside & (order >= low) & (order <= high)
        least = tl.minimum(least, tl.where(between, order, 0x7FFFFFFF))
        most = tl.maximum(most, tl.where(between, order, -0x80000000))
    tl.store(sums_ptr + j, over)
    tl.store(bounds_ptr, tl.min(least, axis=0))
    tl.store(bounds_ptr + 1, tl.max(most, axis=0))


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
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
                first = _search(
                    row_ptr, first, last, first, top_k.to(tl.int64), highest, scale, V, BLOCK, False
                )
            if by_p:
                total = _weight_from(row_ptr, first, highest, scale, V, BLOCK)
                target = _share_of(top_p, total)
                first = _search(row_ptr, first, last, first, target, highest, scale, V, BLOCK, True)
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
def _share_of(top_p, total):
    """top_p * total, rounded up: a whole number reaches one exactly if it reaches the other."""
    exact = top_p.to(tl.float64) * total.to(tl.float64)
    share = exact.to(tl.int64)
    return share + (share.to(tl.float64) < exact).to(tl.int64)


@triton.jit
def _weight(x, highest, scale, counts, BY_MASS: tl.constexpr):
    """1 where it counts, or exp(x / T - m / T) as a whole number of 2^-40."""
    if BY_MASS:
        # A -inf logit must not become NaN.
        exponent = (tl.maximum(x, -3.0e38) - highest) * scale
        return tl.where(counts, tl.exp2(exponent) * ONE, 0.0).to(tl.int64)
    return counts.to(tl.int64)


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
    """Sums the weights of the logits of order `first` and above."""
    v = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        inside = start + v < V
        x = tl.load(row_ptr + start + v, mask=inside, other=-INFINITY)
        total += _weight(x, highest, scale, inside & (_order(x) >= first), True)
    return tl.sum(total, axis=0)


@triton.jit
def _search(
    row_ptr,
    low,
    high,
    first,
    target,
    highest,
    scale,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """Finds the highest logit x such that the logits >= x, those below `first` left out, weigh `target`.

    The answer is in [low, high] (orders of logits of the row), which each pass cuts to about a quarter; it
    stops early when the interval holds a single distinct logit, which is usually after half of the 16 passes
    that 32 bits can need.
    """
    v = tl.arange(0, BLOCK)
    while low < high:
        # 64 bits: the orders of -x and x may lie further apart than int32 reaches.
        span = high.to(tl.int64) - low
        a = (low + span // 4 + 1).to(tl.int32)
        b = (low + span // 2 + 1).to(tl.int32)
        c = (low + 3 * span // 4 + 1).to(tl.int32)
        over_a = tl.zeros((BLOCK,), tl.int64)
        over_b = tl.zeros((BLOCK,), tl.int64)
        over_c = tl.zeros((BLOCK,), tl.int64)
        least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        most = tl.full((BLOCK,), -0x80000000, tl.int32)
        for start in tl.range(0, V, BLOCK, num_stages=3):
            inside = start + v < V
            x = tl.load(row_ptr + start + v, mask=inside, other=-INFINITY)
            order = _order(x)
            weight = _weight(x, highest, scale, inside & (order >= first), BY_MASS)
            over_a += tl.where(order >= a, weight, 0)
            over_b += tl.where(order >= b, weight, 0)
            over_c += tl.where(order >= c, weight, 0)
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
