"""Times the GPU kernels: `python -m benchmarks.kernels [--part NAME ...] [--json PATH] [--tune] [--dry-run]`.

Parts: `decode` and `prefill` attention beside torch's own and whatever rivals are
installed, and `ops`, the rest. Everything is calibrated first, and shares are of that. Needs torch and triton
alone.

`--tune` tries launch shapes instead and writes the best to `kernels/tuning/`. `--dry-run` runs every path
once, tiny, on the CPU in Triton's interpreter; it reports no figures.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTS = ("decode", "prefill", "ops")
BUDGET_S = 380.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this (may be given again)")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all (default: 380)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--fa3", default="", metavar="FILE", help="vLLM's _vllm_fa3_C library, to compare with"
    )
    parser.add_argument("--tune", action="store_true", help="write a table of launch shapes for this GPU")
    parser.add_argument("--dry-run", action="store_true", help="check that it runs, without a GPU")
    options = parser.parse_args()
    if options.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    run(options)


def run(options: argparse.Namespace) -> None:
    """Does what the command line says."""
    import torch

    from benchmarks.kernels import tune
    from benchmarks.kernels.timing import Deadline, Lab, calibrate

    lab = Lab(options.dry_run, options.fa3)
    if not lab.dry and not torch.cuda.is_available():
        print("benchmarks.kernels: this machine has no CUDA device, so there is nothing to time")
        return
    if options.tune:
        table = tune.tune(lab, Deadline(options.budget))
        if not lab.dry:
            tune.write(table)
        return
    best = calibrate(lab)
    if not lab.dry:
        print(
            f"copy {best.copy_bytes_per_s / 1e12:.2f} TB/s, "
            f"bf16 matmul {best.matmul_flops / 1e12:.0f} TFLOP/s, graph launch {best.graph_launch_us:.1f} us"
        )
    rows: list[Any] = []
    parts = options.part or PARTS
    missing = set(parts)
    for part in parts:
        deadline = Deadline(options.budget / len(parts))
        for row in part_rows(part, lab, best):
            rows.append(row)
            print(row, flush=True)
            _save(options.json, lab, best, rows, missing)
            if deadline.passed():
                print(f"{part}: stopped after {options.budget / len(parts):.0f} s; the rest of it is missing")
                break
        else:
            missing.discard(part)
    _save(options.json, lab, best, rows, missing)


def part_rows(part: str, lab: Any, best: Any) -> Iterator[Any]:
    """The figures of a part."""
    from benchmarks.kernels import attention, ops

    if part == "ops":
        yield from ops.op_rows(lab, best)
        return
    shapes = attention.decode_shapes(lab) if part == "decode" else attention.prefill_shapes(lab)
    flexed = 0
    for shape in shapes:
        # Compiled for each shape, in tens of seconds: a few big ones are enough.
        with_flex = not lab.dry and flexed < 4 and shape.context >= 4096 and shape.heads == 32
        row = attention.measure(lab, shape, best, with_flex)
        if row is not None:
            flexed += "flex" in row.rivals
            yield row


def _save(path: Path | None, lab: Any, best: Any, rows: list[Any], missing: set[str]) -> None:
    """Writes all that is known so far."""
    import dataclasses

    import triton

    from benchmarks import machine

    if path is not None:
        record = {
            "benchmark": "kernels",
            "machine": machine.describe(lab.device),
            "triton": triton.__version__,
            "dry_run": lab.dry,
            "calibration": None if lab.dry else dataclasses.asdict(best),
            "missing": sorted(missing),
            "results": [] if lab.dry else [row.plain() for row in rows],
        }
        machine.save(path, record)


if __name__ == "__main__":
    main()
