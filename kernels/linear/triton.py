"""Linears that cuBLAS does not have: weights in 8 or 4 bits, and 16-bit ones summed in a fixed order.

Weights stay in their few bits until they are in registers. Inputs are cut into *segments*, whose sums are
added one after another. With few rows a program takes one segment, so that the weight is read by the whole
device, and the program that finishes a tile last adds the segments; with many rows a program takes all of
them. Either way each result is the same sum in the same order: the rows beside it change no bit as long as
tiles are of one size, which deterministic mode fixes.

Layout: 8 and 16 bits `[O, I]` as they are. 4 bits `[O, I / 2]`: in each `2 * STEP` inputs, byte j holds input
j in its low half and input j + STEP in its high half, so that both halves are dense tiles. Scales and zeros
are `[G, O]`.
"""
# mypy: ignore-errors

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.tuning.device import hopper, multiprocessors
from kernels.tuning.tables import tuned
from kernels.types import PackedLinear, QuantizedWeight

STEPS = (64, 32, 16)  # inputs that a program multiplies at a time: all of one group
SMALL_ROWS = 64  # up to these, segments are spread over programs
# In fp32, 2^23 with a whole number below 2^23 in its last bits is their sum: a conversion by an OR.
WHOLE_BITS = tl.constexpr(0x4B000000)
WHOLE = tl.constexpr(8388608.0)


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """Tile of results, and how many programs to spread a small product over.

    Attributes:
        registers: at most so many per thread; None leaves it to the assembler.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    target_programs: int
    registers: int | None = None


@functools.cache
def linear_config(rows: int, bits: int, device: torch.device, deterministic: bool) -> LinearConfig:
    """Picks the tile for so many rows, a power of two.

    Tiles of 16 rows use another tensor core instruction than larger ones, and so may differ in a bit.
    """
    block = 64 if deterministic else max(16, rows)
    # Small tiles: there are up to three results in registers (of all segments, of one, of a group).
    default = LinearConfig(block, 64, 8 if block >= 64 else 4, 3, 2 * multiprocessors(device))
    if bits == 4 and block >= 64 and not hopper(device):
        # Every warp has rows of its own and widens all columns: 64 of them spill. So does the assembler, left
        # to itself, to make room for one program more.
        default = replace(default, columns=32, warps=block // 16, registers=255)
    return replace(default, **tuned(device, "linear", f"{block} rows {bits} bits"))


def step_of(inputs: int, groups: int) -> int:
    """Inputs per step; 0 where groups are too small or odd for these kernels."""
    group = inputs // groups
    if groups == 1:
        return STEPS[0]
    return next((step for step in STEPS if group % step == 0), 0)


def pack(w: QuantizedWeight, bias_O: Tensor | None, deterministic: bool = False) -> PackedLinear:
    """Packs a quantised weight whose groups `step_of` accepts."""
    outputs, inputs = w.value_OI.shape
    step = step_of(inputs, w.scale_OG.shape[1])
    values = _pack_nibbles(w.value_OI, step) if w.bits == 4 else w.value_OI.contiguous()
    zero_GO = None if w.zero_OG is None else w.zero_OG.t().contiguous()
    scale_GO = w.scale_OG.t().contiguous()
    return PackedLinear(
        "triton", values, bias_O, outputs, inputs, w.bits, scale_GO, zero_GO, w.order_I, deterministic
    )


def pack_16_bits(weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
    """A weight as it is, to be multiplied in a fixed order."""
    return PackedLinear("triton", weight_OI, bias_O, *weight_OI.shape, bits=16, deterministic=True)


def linear(x_TI: Tensor, packed: PackedLinear) -> Tensor:
    """`x @ weight.T + bias`."""
    if packed.order_I is not None:
        x_TI = x_TI[:, packed.order_I]
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    rows, device = x_TI.shape[0], x_TI.device
    groups = 1 if packed.scale_OG is None else packed.scale_OG.shape[0]
    step = step_of(packed.inputs, groups)
    step_inputs = 2 * step if packed.bits == 4 else step
    config = linear_config(
        min(triton.next_power_of_2(max(rows, 1)), 2 * SMALL_ROWS), packed.bits, device, packed.deterministic
    )
    y_TO = torch.empty((rows, packed.outputs), dtype=x_TI.dtype, device=device)
    if not rows:
        return y_TO
    columns = triton.cdiv(packed.outputs, config.columns)
    few = rows <= SMALL_ROWS
    cuts = few or packed.deterministic
    segments, segment_steps = _segments(packed, step_inputs, columns if cuts else packed.outputs, config)
    spread = segments > 1 and few
    tiles = (triton.cdiv(rows, config.rows), columns)
    part = torch.empty((segments, rows, packed.outputs) if spread else 1, dtype=torch.float32, device=device)
    _linear[(*tiles, segments if spread else 1)](
        x_TI,
        packed.weight,
        packed.scale_OG if packed.scale_OG is not None else packed.weight,
        packed.zero_OG if packed.zero_OG is not None else packed.weight,
        packed.bias_O if packed.bias_O is not None else x_TI,
        y_TO,
        part,
        counters(device) if spread else part,
        rows,
        packed.outputs,
        packed.inputs,
        x_TI.stride(0),
        packed.weight.stride(0),
        segments,
        segment_steps,
        packed.inputs // groups,
        BITS=packed.bits,
        FLOATS=packed.weight.is_floating_point(),
        PER_CHANNEL=groups == 1,
        SCALES=packed.scale_OG is not None,
        ZEROS=packed.zero_OG is not None,
        BIAS=packed.bias_O is not None,
        SPREAD=spread,
        SEQUENCE=segments > 1 and not spread,
        STEP=step,
        EVEN=packed.inputs % step_inputs == 0,
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    return y_TO


def _segments(packed: PackedLinear, step_inputs: int, columns: int, config: LinearConfig) -> tuple[int, int]:
    """(segments, steps in each): from the weight alone, whatever the rows. A segment has at least 4 steps."""
    steps = triton.cdiv(packed.inputs, step_inputs)
    wanted = max(1, min(triton.cdiv(config.target_programs, columns), steps // 4))
    each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, each), each


@functools.cache
def counters(device: torch.device) -> Tensor:
    """How many segments of each tile are done; zero between launches."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def _pack_nibbles(value_OI: Tensor, step: int) -> Tensor:
    outputs, inputs = value_OI.shape
    padded = F.pad(value_OI, (0, -inputs % (2 * step))).view(outputs, -1, 2, step)
    return ((padded[:, :, 0] & 15) | (padded[:, :, 1] << 4)).flatten(1).contiguous()


@triton.jit(do_not_specialize=["rows", "segments", "segment_steps"])
def _linear(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    part_ptr,
    done_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    segments,
    segment_steps,
    group,
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SPREAD: tl.constexpr,
    SEQUENCE: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride
    weight_at = weight_ptr + n.to(tl.int64)[:, None] * weight_stride
    first = 0
    if SPREAD:
        first = tl.program_id(2)
    total = _segment(
        x_at, weight_at, scale_ptr, zero_ptr, m < rows, n, outputs, inputs, first * segment_steps,
        segment_steps, group, BITS, FLOATS, PER_CHANNEL, ZEROS, STEP, EVEN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if SEQUENCE:
        for segment in range(1, segments):
            total += _segment(
                x_at, weight_at, scale_ptr, zero_ptr, m < rows, n, outputs, inputs, segment * segment_steps,
                segment_steps, group, BITS, FLOATS, PER_CHANNEL, ZEROS, STEP, EVEN, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    at = m.to(tl.int64)[:, None] * outputs + n[None, :]
    if SPREAD:
        size = rows.to(tl.int64) * outputs
        tl.store(part_ptr + first * size + at, total, mask=mask)
        # All threads have stored before one of them says so; whoever reads the last "done" sees it all.
        tl.debug_barrier()
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        done = tl.atomic_add(done_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if done == segments - 1:
            tl.debug_barrier()
            tl.store(done_ptr + tile, 0)
            total = tl.load(part_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
            for segment in range(1, segments):
                total += tl.load(part_ptr + segment * size + at, mask=mask, other=0.0, cache_modifier=".cg")
            _finish(y_ptr + at, total, scale_ptr, bias_ptr, n, outputs, mask, PER_CHANNEL, SCALES, BIAS)
    else:
        _finish(y_ptr + at, total, scale_ptr, bias_ptr, n, outputs, mask, PER_CHANNEL, SCALES, BIAS)


@triton.jit
def _finish(
    y_at,
    total,
    scale_ptr,
    bias_ptr,
    n,
    outputs,
    mask,
    PER_CHANNEL: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
):
    if PER_CHANNEL and SCALES:
        total *= tl.load(scale_ptr + n, mask=n < outputs, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(y_at, total.to(y_at.dtype.element_ty), mask=mask)


@triton.jit
def _segment(
    x_at,
    weight_at,
    scale_ptr,
    zero_ptr,
    is_row,
    n,
    outputs,
    inputs,
    first_step,
    steps,
    group,
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ZEROS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum over some steps' inputs; scaled already where scales differ between them."""
    j = tl.arange(0, STEP)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    step_inputs: tl.constexpr = 2 * STEP if BITS == 4 else STEP
    last = tl.minimum(first_step + steps, tl.cdiv(inputs, step_inputs))
    for number in range(first_step, last):
        i = number * step_inputs
        x = _load(x_at + i + j, is_row[:, None], i + j < inputs, EVEN)
        if BITS == 4:
            packed = tl.load(weight_at + number * STEP + j, mask=(n < outputs)[:, None], other=0)
            acc = _add(
                acc, x, _whole((packed & 15) ^ 8, 8), scale_ptr, zero_ptr, n, outputs, i, inputs, group,
                PER_CHANNEL, ZEROS,
            )  # fmt: skip
            i += STEP
            x = _load(x_at + i + j, is_row[:, None], i + j < inputs, EVEN)
            weight = _whole(((packed >> 4) & 15) ^ 8, 8)
        else:
            stored = _load(weight_at + i + j, (n < outputs)[:, None], i + j < inputs, EVEN)
            if FLOATS:
                weight = stored
            else:
                weight = _whole((stored.to(tl.int32) & 255) ^ 128, 128)
        acc = _add(
            acc, x, weight, scale_ptr, zero_ptr, n, outputs, i, inputs, group, PER_CHANNEL, ZEROS
        )  # fmt: skip
    return acc


@triton.jit
def _load(at, is_row, is_input, EVEN: tl.constexpr):
    if EVEN:
        tile = tl.load(at, mask=is_row, other=0.0)
    else:
        tile = tl.load(at, mask=is_row & is_input, other=0.0)
    return tile


@triton.jit
def _whole(raised, OFFSET: tl.constexpr):
    """fp32 of whole numbers that were raised by OFFSET to be at least 0."""
    return (raised.to(tl.int32) | WHOLE_BITS).to(tl.float32, bitcast=True) - (WHOLE + OFFSET)


@triton.jit
def _add(
    acc,
    x,
    weight,
    scale_ptr,
    zero_ptr,
    n,
    outputs,
    i,
    inputs,
    group,
    PER_CHANNEL: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """Adds a step's product. Weights less their zeros are whole numbers that 16 bits hold exactly."""
    g = tl.minimum(i, inputs - 1) // group
    if ZEROS:
        zero = tl.load(zero_ptr + g * outputs + n, mask=n < outputs, other=0)
        weight = weight - zero.to(tl.float32)[:, None]
    if weight.dtype != x.dtype:
        weight = weight.to(tl.float32).to(x.dtype)
    if PER_CHANNEL:
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    else:
        product = tl.dot(x, tl.trans(weight), input_precision="ieee")
        acc += product * tl.load(scale_ptr + g * outputs + n, mask=n < outputs, other=0.0)[None, :]
    return acc
