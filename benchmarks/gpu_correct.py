"""Runs the tests that need a GPU and counts them as they end.

    python -m benchmarks.gpu_correct [--json FILE] [--workers N] [TEST ...]

The count is written every second: whoever stops the run in the middle finds what was known by then. Needs
pytest, and none of the suite's plugins; with pytest-xdist several processes compile kernels at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine

TESTS = (
    "tests/kernels",
    "tests/integration/test_engine_cuda.py",
    "tests/integration/test_engine_deterministic.py",
)
WORKERS = 12
WRITE_INTERVAL_S = 1.0


class Tally:
    """A pytest plugin that counts outcomes. A test whose set-up or clean-up breaks has failed.

    Attributes:
        found: what is written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self._written_s = 0.0
        self._began_s = time.monotonic()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.found: dict[str, Any] = {
            "finished": False, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": []
        }  # fmt: skip
        self._record = {
            "benchmark": "correct",
            "results": [self.found],
            "machine": machine.describe(device),
            "settings": settings,
        }
        self._write(last=True)  # nothing that an earlier run has left is to pass for this one's

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._fail(report.nodeid)
        elif report.skipped or report.when == "call":
            self.found[report.outcome] += 1
        self._write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        # Also where pytest itself broke, or too many tests had failed: neither is a finished run.
        self.found["finished"] = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not (
            session.shouldfail or session.shouldstop
        )
        self._write(last=True)

    def _fail(self, nodeid: str) -> None:
        self.found["failed"] += 1
        self.found["failures"].append(nodeid)
        self._write(last=True)

    def _write(self, last: bool = False) -> None:
        now_s = time.monotonic()
        self.found["seconds"] = round(now_s - self._began_s, 1)
        if self._path is not None and (last or now_s - self._written_s >= WRITE_INTERVAL_S):
            machine.save(self._path, self._record)
            self._written_s = now_s


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    options = ["-c", "benchmarks/gpu.ini", "--rootdir", ".", "-m", "gpu", "-v", "--maxfail", "40"]
    if args.workers and importlib.util.find_spec("xdist"):
        options += ["-n", str(args.workers)]
    tally = Tally(args.json, {"dry_run": args.dry_run, "workers": args.workers, "tests": args.tests})
    return pytest.main([*options, *args.tests], plugins=[tally])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="files or folders; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, help=f"processes, with pytest-xdist; default {WORKERS}")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: all tests are skipped")
    args = parser.parse_args(argv)
    if args.workers is None:
        args.workers = 0 if args.dry_run else WORKERS
    return args


if __name__ == "__main__":
    raise SystemExit(main())
