"""The kernel benchmark on a machine without a GPU: every path runs, and no figure comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run(*args: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels", "--dry-run", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_dry_run_goes_everywhere_and_reports_no_figures(tmp_path: Path) -> None:
    printed = run("--json", str(tmp_path / "out.json"))
    for op in ("decode", "prefill", "norm, rotate, write", "linear int4 g128", "sample top-k top-p"):
        assert f"\n{op} " in f"\n{printed}"
    assert all(line.endswith(" ran") for line in printed.splitlines())
    report = json.loads((tmp_path / "out.json").read_text())
    assert (
        report["dry_run"]
        and report["results"] == []
        and report["missing"] == []
        and report["calibration"] is None
    )


@pytest.mark.slow
def test_a_dry_run_of_tuning_writes_nothing() -> None:
    folder = Path("kernels/tuning")
    before = sorted(folder.iterdir())
    assert "tuned decode 128 bfloat16" in run("--tune")
    assert sorted(folder.iterdir()) == before
