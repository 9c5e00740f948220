"""Drawing one token per row without a sort and without a softmax. `README.md` defines every step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sample.triton_search import MIN_TEMPERATURE, lowest_kept
from kernels.types import SampleParams

DRAW_BLOCK = 2048
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


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "seed_ptr", "position_ptr", "threshold_ptr"])
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
