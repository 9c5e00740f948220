"""Resident memory of a real server: after start, against what it should take, and over many requests.

    python -m benchmarks.memory [--model DIR] [--requests 2000] [--json FILE]

What it should take is the weights and the KV pool, as the start-up report says, and 400 MB for everything
else in both processes. Growth is judged after a tenth of the requests, when pools and caches are warm.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import uvloop

from benchmarks import machine, processes
from server.bench.drive import bench
from server.bench.options import BenchOptions, LengthRange

MB = 1e6
BASE_BYTES = 400 * MB
TOLERANCE = 1.15
GROWTH_BYTES = 10 * MB
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
START_LIMIT_S = 120.0


class Server:
    """A running `quire serve` and what its start-up report says."""

    def __init__(self, pid: int, report: str) -> None:
        found = re.search(r"^API +(\S+)/v1", report, re.M)
        assert found is not None, report
        self.url = found[1]
        self.weight_bytes = _size_in(r"^weights +([\d.]+) (\w+)", report)
        self.kv_bytes = _size_in(r"^KV pool +([\d.]+) (\w+)", report)
        (engine,) = processes.children(pid)
        self._pids = {"api": pid, "engine": engine}

    def resident(self) -> dict[str, int]:
        return {name: processes.rss_bytes(pid) for name, pid in self._pids.items()}

    @property
    def expected_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + BASE_BYTES


def _size_in(pattern: str, report: str) -> float:
    found = re.search(pattern, report, re.M)
    assert found is not None, report
    return float(found[1]) * UNITS[found[2]]


@contextmanager
def serving(arguments: list[str]) -> Iterator[Server]:
    """Starts `quire serve` on a free port of 127.0.0.1 and ends it after the block."""
    command = [sys.executable, "-m", "server.cli", "serve", *arguments, "--port", "0", "--no-access-log"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stderr=log, cwd=machine.ROOT) as process,
    ):
        try:
            yield Server(process.pid, _wait_for_report(process, log))
        finally:
            process.terminate()


def _wait_for_report(process: subprocess.Popen[bytes], log: IO[str]) -> str:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        log.seek(0)
        report = log.read()
        if re.search(r"^API .*\n", report, re.M):
            return report
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{report}")


def send(url: str, count: int, seed: int) -> None:
    """`count` requests of many lengths, 16 at a time."""
    options = BenchOptions(
        url=url,
        requests=count,
        concurrency=16,
        warmup=0,
        input_len=LengthRange(1, 200),
        output_len=LengthRange(1, 32),
        temperature=1.0,
        seed=seed,
        max_seconds=900,
        quiet=True,
    )
    result = uvloop.run(bench(options))
    if result.failed or result.missing:
        raise SystemExit(f"requests failed: {result.errors()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Resident memory after start and over many requests.")
    parser.add_argument("--model", help="default: the built-in model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with serving([args.model] if args.model else []) as server:
        start = server.resident()
        allowed = TOLERANCE * server.expected_bytes
        total = sum(start.values())
        print(f"after start: {_show(start)}")
        print(
            f"expected: weights {server.weight_bytes / MB:.1f} + KV pool {server.kv_bytes / MB:.1f} "
            f"+ {BASE_BYTES / MB:.0f} MB = {server.expected_bytes / MB:.1f} MB; "
            f"with 15 % {allowed / MB:.1f}: {'kept' if total <= allowed else 'exceeded'}"
        )
        samples = [(0, start)]
        for tenth in range(1, 11):
            send(server.url, args.requests // 10, seed=tenth)
            samples.append((tenth * args.requests // 10, server.resident()))
            print(f"after {samples[-1][0]:>5} requests: {_show(samples[-1][1])}", flush=True)
        grown = sum(samples[-1][1].values()) - sum(samples[1][1].values())
        verdict = "no growth" if grown < GROWTH_BYTES else "grows"
        print(f"from {samples[1][0]} to {samples[-1][0]} requests: {grown / MB:+.1f} MB: {verdict}")
        result = {
            "machine": machine.describe(),
            "expected_bytes": server.expected_bytes,
            "start_bytes": start,
            "samples": samples,
            "grown_bytes": grown,
        }
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _show(resident: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {size / MB:.1f}" for name, size in resident.items())
    return f"{sum(resident.values()) / MB:.1f} MB ({parts})"


if __name__ == "__main__":
    main()
