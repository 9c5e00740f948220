"""Compiles the GPU kernels that the engine would launch, without a GPU, and says what each of them needs.

    python -m benchmarks.gpu_compile [--archs 80,89,90] [--quick] [--json FILE] [--table]

Registers, spills, shared memory and telling instructions of every kernel, for each head size, group, block
size, KV format and feature of the supported families. Calls the ops' own launch functions, so that what is
compiled is what production launches: the same constants, specialisations and launch shapes. Only the launch
is left out. It cannot see speed, races or wrong addresses.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.kv_format import kv_width
from kernels.linear import triton as triton_linear
from kernels.paged_attention import triton_config
from kernels.tuning import device as gpu
from kernels.types import (
    AttentionBatch,
    DecodeInputs,
    HeadNorms,
    PenaltyParams,
    QuantizedWeight,
    SampleParams,
)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTIONS = re.compile(r"\b(HGMMA|HMMA|LDL|STL|LDGSTS\.E\.[A-Z.]*128|LDGSTS|LDG\.E\.[A-Z.]*128|LDG)\b")
SM_COUNT = 132
# An A100, desktop cards and others with little shared memory, and an H100 or H200.
ARCHS = (80, 89, 90)
# What one program may have of an SM's shared memory.
SHARED_BYTES = {arch: size * 1024 for arch, size in ((80, 163), (86, 99), (89, 99), (90, 227), (120, 99))}
BF16, FP16, INT8, FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
Case = tuple[str, Callable[[], object]]


class NoDevice(DriverBase):
    """Stands in for the CUDA driver: names a target, owns no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(arch: int) -> None:
    """Makes launchers compile for a GPU that is not there, as long as the process lives."""
    driver.set_active(NoDevice(arch))  # type: ignore[no-untyped-call]
    gpu.capability = lambda device: divmod(arch, 10)
    triton_config.multiprocessors = triton_linear.multiprocessors = lambda device: SM_COUNT


def inspect(case: str, name: str, kernel: Any) -> dict[str, Any]:
    """What one compiled kernel needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run(
                [TOOLS / "cuobjdump", flag, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    wide = (re.sub(r"\.E\..*128", ".128", word) for word in INSTRUCTIONS.findall(sass))
    return {
        "case": case,
        "kernel": name,
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": collections.Counter(wide),
        # How many commit groups may still be under way at each wait; all zero means that loads never overlap.
        "pending_loads": [int(n) for n in re.findall(r"async_wait.*?num = (\d+)", kernel.asm["ttgir"])],
    }


def attention(
    head_dim: int,
    group: int,
    block_size: int = 64,
    *,
    dtype: torch.dtype = BF16,
    memory: torch.dtype | None = None,
    window: int = 0,
    softcap: float = 0.0,
    queries: tuple[int, ...] = (1, 512),
    deterministic: bool = False,
) -> None:
    """Decode (1 query), prefill, and the kernels around them."""
    from kernels.paged_attention.triton import paged_attention

    sequences, groups = 3, 8
    memory = memory or dtype
    kv_N2GPD = torch.zeros(2, 2, groups, block_size, kv_width(head_dim, memory), dtype=memory)
    for count in queries:
        q_THD = torch.zeros(sequences * count, groups * group, head_dim, dtype=dtype)
        batch = AttentionBatch(
            page_table_SB=torch.zeros(sequences, 128, dtype=torch.int32),
            query_start_S1=torch.arange(sequences + 1, dtype=torch.int32) * count,
            seq_len_S=torch.full((sequences,), count, dtype=torch.int32),
            num_decodes=sequences if count == 1 else 0,
            max_query_len=count,
            max_seq_len=8192,
        )
        paged_attention(
            q_THD, kv_N2GPD, batch, scale=0.1, window=window, softcap=softcap, deterministic=deterministic
        )


def rotate_and_write(
    head_dim: int, *, memory: torch.dtype = BF16, norms: bool = False, rotary_dim: int = 0
) -> None:
    """The kernel between a projection and attention."""
    from kernels.rotate_and_write.triton import rotate_and_write

    qkv = torch.zeros(2, 48, head_dim, dtype=BF16)
    weight = qkv[0, 0]
    position = torch.zeros(2, dtype=torch.int64)
    rotate_and_write(
        qkv[:, :32],
        qkv[:, 32:40],
        qkv[:, 40:],
        torch.zeros(4, rotary_dim or head_dim),
        position,
        torch.zeros(2, 2, 8, 64, kv_width(head_dim, memory), dtype=memory),
        position,
        HeadNorms(weight, weight, 1e-6, 0.0) if norms else None,
    )


def linear(rows: int, bits: int, group: int = 0, *, floats: bool = False, fixed: bool = False) -> None:
    """A product with a weight in few bits, or in a fixed order, of an 8B model's size."""
    from kernels.linear import triton

    outputs, inputs = 6144, 4096
    x_TI = torch.zeros(rows, inputs, dtype=BF16)
    if bits == 16:
        packed = triton.pack_16_bits(torch.zeros(outputs, inputs, dtype=BF16), None)
    else:
        values = torch.zeros(outputs, inputs, dtype=FP8 if floats else INT8)
        scales = torch.zeros(outputs, inputs // group if group else 1)
        zeros = torch.zeros(scales.shape, dtype=INT8) if group else None
        packed = triton.pack(QuantizedWeight(bits, values, scales, zeros), x_TI[0, :1], fixed)
    triton.linear(x_TI, packed)


def round_rows() -> None:
    """Inputs of a product in fp8."""
    from kernels.linear.triton_round import round_rows

    round_rows(torch.zeros(2, 14336, dtype=BF16))


def small_ops() -> None:
    """What is the same for every model, at an 8B model's sizes."""
    from kernels.copy_blocks.triton import copy_blocks
    from kernels.decode_inputs.triton import decode_inputs
    from kernels.logprobs.triton import logprobs
    from kernels.mask_tokens.triton import mask_tokens
    from kernels.penalize.triton import penalize
    from kernels.rms_norm.triton import rms_norm
    from kernels.sample.triton import lowest_kept, sample
    from kernels.silu_mul.triton import silu_mul

    def bf16(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=BF16)

    slots, vocabulary = torch.zeros(2, dtype=torch.int64), 151936
    kv_N2GPD, logits_SV = bf16(2, 2, 8, 64, 128), torch.zeros(2, vocabulary)
    ones = torch.ones(2)
    copy_blocks(kv_N2GPD, slots, slots)
    rms_norm(bf16(2, 4096), bf16(4096), 1e-6, residual_TE=bf16(2, 4096))
    silu_mul(bf16(2, 2 * 14336))
    silu_mul(bf16(2, 2 * 14336), activation="gelu_tanh")
    params = SampleParams(ones, slots.int(), ones, ones, slots, slots, False, True)
    sample(logits_SV, params)
    lowest_kept(logits_SV, params, parts=1)
    table_SB, lengths = torch.zeros(2, 65, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    inputs = DecodeInputs(slots, slots, slots, slots, lengths, table_SB)
    decode_inputs(torch.zeros(5, 2, dtype=torch.int64), slots, table_SB, 64, inputs)
    logprobs(logits_SV, slots, 5)
    state = torch.zeros(1, vocabulary)
    mask_tokens(logits_SV, torch.zeros(2, vocabulary // 32, dtype=torch.int32), slots)
    penalize(logits_SV, PenaltyParams(slots, state.int(), state.bool(), ones, ones, ones))


def quick_cases(arch: int) -> Iterator[Case]:
    """One of each kind: what CI compiles."""
    bind = functools.partial
    yield "D128 group 4", bind(attention, 128, 4)
    yield "D128 short queries", bind(attention, 128, 4, queries=(8,))
    yield "D128 group 2 block 16", bind(attention, 128, 2, 16)
    yield "D64 group 7", bind(attention, 64, 7)
    yield "D256 window softcap", bind(attention, 256, 2, window=4096, softcap=50.0)
    yield "D256 int8", bind(attention, 256, 4, memory=INT8)
    yield "D256 fp32", bind(attention, 256, 4, dtype=torch.float32)
    yield "D128 int8", bind(attention, 128, 4, memory=INT8)
    yield "D128 deterministic", bind(attention, 128, 4, queries=(1,), deterministic=True)
    yield "D128 norms", bind(rotate_and_write, 128, norms=True)
    yield "D128 int8 norms", bind(rotate_and_write, 128, memory=INT8, norms=True)
    yield "int4 g128, 1 row", bind(linear, 1, 4, 128)
    yield "int4 g128, 512 rows", bind(linear, 512, 4, 128)
    yield "int4 g128 fixed order, 512 rows", bind(linear, 512, 4, 128, fixed=True)
    yield "fixed order, 32 rows", bind(linear, 32, 16)
    if arch >= 89:
        yield "fp8 rows", round_rows
        yield "D128 fp8", bind(attention, 128, 4, memory=FP8)
        yield "D128 fp8 norms", bind(rotate_and_write, 128, memory=FP8, norms=True)
    yield "small ops", small_ops


def all_cases(arch: int) -> Iterator[Case]:
    """Head sizes 64 to 256 by KV formats, then each other axis by itself at sizes that models have."""
    bind = functools.partial
    memories = [("", None), (" int8", INT8), *([(" fp8", FP8)] if arch >= 89 else [])]
    for head_dim in (64, 80, 96, 112, 128, 160, 192, 256):
        for name, memory in memories:
            yield f"D{head_dim}{name}", bind(attention, head_dim, 4, memory=memory, queries=(1, 8, 512))
        for name, memory in memories:
            yield (
                f"D{head_dim}{name} norms",
                bind(rotate_and_write, head_dim, memory=memory or BF16, norms=True),
            )
    for head_dim in (64, 128):
        for group in (1, 2, 3, 5, 6, 7, 8, 16):
            yield f"D{head_dim} group {group}", bind(attention, head_dim, group)
    for block_size in (16, 32, 128):
        for name, memory in memories:
            yield f"D128{name} block {block_size}", bind(attention, 128, 4, block_size, memory=memory)
    for name, memory in memories:
        yield f"D256{name} block 16", bind(attention, 256, 4, 16, memory=memory)
    for head_dim in (64, 128, 256):
        for name, memory in memories:
            yield f"D{head_dim}{name} window", bind(attention, head_dim, 2, memory=memory, window=4096)
        yield f"D{head_dim} window softcap", bind(attention, head_dim, 2, window=4096, softcap=50.0)
        yield f"D{head_dim} softcap", bind(attention, head_dim, 2, softcap=50.0)
        yield f"D{head_dim} fp16", bind(attention, head_dim, 4, dtype=FP16)
        yield f"D{head_dim} fp32", bind(attention, head_dim, 4, dtype=torch.float32)
        yield f"D{head_dim} deterministic", bind(attention, head_dim, 4, queries=(1, 512), deterministic=True)
    for rows in (1, 32, 64, 512):
        for group in (32, 64, 128):
            yield f"int4 g{group}, {rows} rows", bind(linear, rows, 4, group)
        yield f"int4, {rows} rows", bind(linear, rows, 4)
        yield f"int8, {rows} rows", bind(linear, rows, 8)
        yield f"int8 g128, {rows} rows", bind(linear, rows, 8, 128)
        yield f"fixed order, {rows} rows", bind(linear, rows, 16)
        yield f"int4 g128 fixed order, {rows} rows", bind(linear, rows, 4, 128, fixed=True)
        if arch >= 89:
            yield f"fp8, {rows} rows", bind(linear, rows, 8, floats=True)
    if arch >= 89:
        yield "fp8 rows", round_rows
    for rotary_dim in (32, 64):
        yield f"D128 rotary {rotary_dim}", bind(rotate_and_write, 128, rotary_dim=rotary_dim)
    yield "D128 without norms", bind(rotate_and_write, 128)
    yield "small ops", small_ops


def compile_for(arch: int, quick: bool) -> None:
    """Prints a JSON line for each kernel. One architecture in a process."""
    pretend(arch)
    stock_run, seen = JITFunction.run, set()
    for case, launch in (quick_cases if quick else all_cases)(arch):

        def run(self: Any, *args: Any, grid: Any, warmup: bool, case: str = case, **kwargs: Any) -> Any:
            kernel = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                print(json.dumps(inspect(case, self.__name__, kernel)), flush=True)
            return kernel

        JITFunction.run = run
        launch()


def compile_all(archs: tuple[int, ...], quick: bool, timeout_s: float) -> dict[int, list[dict[str, Any]]]:
    """Every kernel's needs, by architecture, each in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_compile", *(["--quick"] if quick else [])]

    def compile_one(arch: int) -> list[dict[str, Any]]:
        child = [*command, "--child", str(arch)]
        done = subprocess.run(child, capture_output=True, text=True, env=environment, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f"sm_{arch}: {done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor() as pool:
        return dict(zip(archs, pool.map(compile_one, archs), strict=True))


def markdown(results: dict[int, list[dict[str, Any]]]) -> str:
    """A row for each kernel and head size: the most that any of its variants needs."""
    lines = [
        "| kernel | variants | "
        + " | ".join(f"sm_{a}: registers, shared KB, spills" for a in results)
        + " |",
        "| --- | --- | " + " | ".join("---" for _ in results) + " |",
    ]
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for arch, found in results.items():
        for row in found:
            size = re.match(r"D\d+", row["case"])
            name = f"`{row['kernel']}`" + (f" {size[0]}" if size and "plan" not in row["kernel"] else "")
            rows.setdefault(name, {}).setdefault(arch, []).append(row)
    for name in sorted(rows, key=lambda n: (n.split("`")[1], len(n), n)):
        cells = []
        for arch in results:
            mine = rows[name].get(arch, [])
            most = [
                max((row[key] for row in mine), default=0)
                for key in ("registers", "shared_bytes", "spilled_bytes")
            ]
            cells.append(f"{most[0]}, {most[1] / 1024:.0f}, {most[2]}" if mine else "")
        lines.append(f"| {name} | {max(map(len, rows[name].values()))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(results: dict[int, list[dict[str, Any]]]) -> str:
    """A line for each compiled variant, so that a difference can be read."""
    archs = (f'"{arch}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for arch, rows in results.items())
    return f'{{"triton": "{triton.__version__}", "sm": {{\n' + ",\n".join(archs) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)), help="compute capabilities (80,89,90)")
    parser.add_argument("--quick", action="store_true", help="one variant of each kind")
    parser.add_argument("--json", type=Path, help="write every variant here")
    parser.add_argument("--table", action="store_true", help="print a table of kernels and head sizes")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return compile_for(options.child, options.quick)
    results = compile_all(tuple(map(int, options.archs.split(","))), options.quick, timeout_s=7200)
    if options.json:
        options.json.write_text(as_json(results))
    for arch, rows in results.items():
        for row in rows:
            if row["spilled_bytes"] or row["shared_bytes"] > SHARED_BYTES.get(arch, 1 << 20):
                print(f"sm_{arch} {row['kernel']} {row['case']}: spills {row['spilled_bytes']} bytes, "
                      f"{row['shared_bytes']} bytes of shared memory")  # fmt: skip
    if options.table:
        print(markdown(results))
    return None


if __name__ == "__main__":
    main()
