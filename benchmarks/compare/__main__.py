"""Compares Quire with other servers on this machine. See benchmarks/README.md for the peers' settings.

    python -m benchmarks.compare [--models 110m 0.6b] [--engines quire llama.cpp ...] [--workloads W1 ...]
    python -m benchmarks.compare --from benchmarks/results/compare.json --page docs/performance.md

Needs the peers installed by the commands of benchmarks/peers/; says which are not, and goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.compare.bounds import all_bounds, measure_limits
from benchmarks.compare.checkpoints import MODELS
from benchmarks.compare.engines import Engine
from benchmarks.compare.loads import LOADS
from benchmarks.compare.measure import Findings, Plan, Rounds
from benchmarks.compare.page import render, write_page

ENGINES = ["quire", "llama.cpp", "vllm", "transformers"]
QUANTISED = ["quire:int8", "llama.cpp:q8_0", "quire:int4", "llama.cpp:q4_0"]


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    content = json.loads(args.source.read_text()) if args.source else _measure(args)
    print(f"\n{render(content)}")
    if args.page is not None:
        write_page(args.page, content)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    loads = {name: LOADS[name].quick() if args.quick else LOADS[name] for name in args.workloads}
    plan = Plan(args.models, args.engines, loads, args.repeats, args.others_cores, args.attempts)
    limits = measure_limits()
    head = {
        "machine": machine.describe(),
        "versions": {engine.server: engine.version() for engine in plan.engines},
        "models": plan.models,
        "loads": {name: str(load) for name, load in loads.items()},
        "limits": limits._asdict(),
        "bounds": all_bounds(plan.models, loads, limits),
        "repeats": plan.repeats,
        "limit_cores": plan.limit_cores,
        "attempts": plan.attempts,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    findings = Findings(head, args.json)
    if args.resume and args.json.exists():
        try:
            findings.resume(json.loads(args.json.read_text()), plan)
        except ValueError as error:
            raise SystemExit(f"--resume: {args.json} cannot be gone on with: {error}") from None
    Rounds(plan, findings, lambda line: print(line, flush=True)).run()
    return findings.content


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compare Quire with other servers under the same loads, in turn, on this machine.",
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    add("--workloads", nargs="+", choices=LOADS, default=list(LOADS), help="default: all")
    add(
        "--engines", nargs="+", type=_engine, default=list(map(Engine.parse, ENGINES + QUANTISED)),
        metavar="NAME[:VARIANT]", help=f"default: {' '.join(ENGINES + QUANTISED)}",
    )  # fmt: skip
    add("--repeats", type=int, default=3, help="rounds; fewer than 3 give no verdicts (default: 3)")
    add("--quick", action="store_true", help="one request for each client instead of several")
    add(
        "--others-cores", type=float, default=0.1, metavar="CORES",
        help="repeat a run in which anything else took more than this (default: 0.1)",
    )  # fmt: skip
    add("--attempts", type=int, default=3, help="at most, for a disturbed run (default: 3)")
    add("--json", type=Path, default=machine.ROOT / "benchmarks/results/compare.json", help="where to write")
    add("--resume", action="store_true", help="go on with what an interrupted comparison wrote there")
    add("--from", dest="source", type=Path, metavar="JSON", help="measure nothing; show these results")
    add("--page", type=Path, help="also write the tables between the markers of this page")
    return parser


def _engine(text: str) -> Engine:
    try:
        return Engine.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    main()
