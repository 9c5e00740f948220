"""From the start of a process to its first token, with a checkpoint on local disk.

    python -m benchmarks.start --model qwen3-0.6b

Writes a random checkpoint of that shape, then starts a fresh process for it twice: first with an empty cache
of compiled kernels, as after an installation, then with the one that the first start has left. The file is
in the page cache of the operating system, as it is after a download.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import parse, write
from benchmarks.models import CONFIGS, random_weights, read_spec

DRY_RUN = {"model": "tiny", "device": "cpu"}


def write_checkpoint(model: str, folder: Path, device: torch.device) -> int:
    """A checkpoint without a tokenizer; returns its bytes."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for slot, weight in random_weights(read_spec(model), dtype=torch.bfloat16, device=device):
        pieces = weight.split([part.shape[0] for part in slot.parts])
        tensors |= {part.name: piece.cpu() for part, piece in zip(slot.parts, pieces, strict=True)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIGS[model], "torch_dtype": "bfloat16"}))
    return (folder / "model.safetensors").stat().st_size


def child(path: str, device: str, started_s: float) -> None:
    """In the new process: builds an engine, and says when what was done."""
    from engine.build import build
    from engine.config import EngineOptions
    from engine.types import SamplingParams

    said = {"imports_s": time.time() - started_s}
    core, _ = build(
        EngineOptions(model=path, device=device, max_model_len=4096 if device == "cuda" else None)
    )
    said["ready_s"] = time.time() - started_s
    core.add("r", list(range(1, 129)), SamplingParams(max_tokens=2, ignore_eos=True))
    while not any(output.token_id is not None for output in core.step()):
        pass
    said["first_token_s"] = time.time() - started_s
    while core.has_work:
        core.step()
    print(json.dumps(said))


def start(path: Path, device: str, cache: Path) -> dict[str, float]:
    """Starts a process and takes what it says."""
    command = [sys.executable, "-m", "benchmarks.start", "--child", str(path), device, repr(time.time())]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if done.returncode:
        raise SystemExit(f"the start failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(args.model, Path(folder), torch.device(args.device))
        for kernels in ("not compiled yet", "compiled before"):
            found = start(Path(folder), args.device, Path(folder) / "triton")
            results.append({"model": args.model, "weight_bytes": size, "kernels": kernels, **found})
            print(results[-1], flush=True)
            write(args, {"benchmark": "start", "results": results})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(CONFIGS), default="qwen3-0.6b")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU: does it run at all?")
    return parse(parser, argv, DRY_RUN)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main()
