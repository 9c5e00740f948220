"""Compiles the Triton kernels for one GPU generation, without a GPU; prints what each needs as JSON lines.

    python -m tests.kernels.compile_kernels 90

Calls the ops' own launch functions, so that what is compiled is what production launches: the same constants,
specialisations and launch shapes. Only the launch itself is left out.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.paged_attention import triton_config
from kernels.types import AttentionBatch, DecodeInputs, PenaltyParams
from tests.helpers.kernels import sample_params

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTIONS = re.compile(r"\b(HGMMA|HMMA|LDL|STL|LDGSTS|LDG\.E\.128|LDG)\b")


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


def inspect(case: str, name: str, kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run(
                [TOOLS / "cuobjdump", flag, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage).groups())
    return {
        "case": case,
        "kernel": name,
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": collections.Counter(INSTRUCTIONS.findall(sass)),
        # How many commit groups may still be under way at each wait; all zero means that loads never overlap.
        "pending_loads": [int(n) for n in re.findall(r"async_wait.*?num = (\d+)", kernel.asm["ttgir"])],
    }


def attention(
    head_dim: int, group: int, block_size: int, *, queries: int = 1, window: int = 0, softcap: float = 0.0
) -> None:
    from kernels.paged_attention.triton import paged_attention

    sequences, groups = 3, 8
    q_THD = torch.zeros(sequences * queries, groups * group, head_dim, dtype=torch.bfloat16)
    kv_N2GPD = torch.zeros(2, 2, groups, block_size, head_dim, dtype=torch.bfloat16)
    batch = AttentionBatch(
        page_table_SB=torch.zeros(sequences, 128, dtype=torch.int32),
        query_start_S1=torch.arange(sequences + 1, dtype=torch.int32) * queries,
        seq_len_S=torch.full((sequences,), queries, dtype=torch.int32),
        num_decodes=sequences if queries == 1 else 0,
        max_query_len=queries,
        max_seq_len=8192,
    )
    paged_attention(q_THD, kv_N2GPD, batch, scale=0.1, window=window, softcap=softcap)


def small_ops() -> None:
    from kernels.copy_blocks.triton import copy_blocks
    from kernels.decode_inputs.triton import decode_inputs
    from kernels.logprobs.triton import logprobs
    from kernels.mask_tokens.triton import mask_tokens
    from kernels.penalize.triton import penalize
    from kernels.rms_norm.triton import rms_norm
    from kernels.rotary.triton import rotary
    from kernels.sample.triton import lowest_kept, sample
    from kernels.silu_mul.triton import silu_mul
    from kernels.write_kv.triton import write_kv

    def bf16(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    slots, vocabulary = torch.zeros(2, dtype=torch.int64), 151936
    kv_N2GPD, logits_SV = bf16(2, 2, 8, 64, 128), torch.zeros(2, vocabulary)
    write_kv(bf16(2, 8, 128), bf16(2, 8, 128), kv_N2GPD, slots)
    copy_blocks(kv_N2GPD, slots, slots)
    rms_norm(bf16(2, 4096), bf16(4096), 1e-6, residual_TE=bf16(2, 4096))
    rms_norm(bf16(2, 48, 128)[:, :32], bf16(128), 1e-6)
    rotary(bf16(2, 32, 128), bf16(2, 8, 128), torch.zeros(4, 128), slots)
    silu_mul(bf16(2, 2 * 14336))
    sample(logits_SV, sample_params(2, top_p=0.9))
    lowest_kept(logits_SV, sample_params(2, top_p=0.9), parts=1)
    logprobs(logits_SV, slots, 5)
    table_SB, lengths = torch.zeros(2, 65, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    inputs = DecodeInputs(slots, slots, slots, slots, lengths, table_SB)
    decode_inputs(torch.zeros(5, 2, dtype=torch.int64), slots, table_SB, 64, inputs)
    state = torch.zeros(1, vocabulary)
    ones = torch.ones(2)
    mask_tokens(logits_SV, torch.zeros(2, vocabulary // 32, dtype=torch.int32), slots)
    penalize(logits_SV, PenaltyParams(slots, state.int(), state.bool(), ones, ones, ones))


CASES = {
    "D128 group 4 P64": lambda: (attention(128, 4, 64), attention(128, 4, 64, queries=512)),
    "D128 short queries": lambda: attention(128, 4, 64, queries=8),
    "D128 group 2 P16": lambda: (attention(128, 2, 16), attention(128, 2, 16, queries=512)),
    "D64 group 7 P64": lambda: (attention(64, 7, 64), attention(64, 7, 64, queries=512)),
    "D256 window softcap": lambda: (
        attention(256, 2, 64, window=4096, softcap=50.0),
        attention(256, 2, 64, queries=512, window=4096, softcap=50.0),
    ),
    "small ops": small_ops,
}


def recorder(stock_run: Any, case: str) -> Any:
    """Returns a `JITFunction.run` that compiles, reports and does not launch."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        print(json.dumps(inspect(case, self.__name__, kernel)), flush=True)
        return kernel

    return run


def main(arch: int) -> None:
    driver.set_active(NoDevice(arch))
    triton_config._hopper = lambda device: arch >= 90
    stock_run = JITFunction.run
    for case, launch in CASES.items():
        JITFunction.run = recorder(stock_run, case)
        launch()


if __name__ == "__main__":
    main(int(sys.argv[1]))
