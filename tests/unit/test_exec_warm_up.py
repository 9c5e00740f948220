"""The steps before the first request: what they leave behind, and that they compile what requests need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks import start_kernels
from engine.exec.warm_up import warm_up
from engine.types import SamplingParams
from kernels import api
from tests.helpers.engines import run

REQUESTS = [
    ("greedy", [5, 17, 3], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)),
    ("sampled", [9] * 70, SamplingParams(top_p=0.9, seed=3, max_tokens=9, ignore_eos=True)),
]


def tokens(core: start_kernels.EngineCore) -> dict[Any, list[int]]:
    return {key: stream.token_ids for key, stream in run(core, REQUESTS).items()}


def test_a_warm_up_changes_no_token_and_captures_nothing() -> None:
    cold, _ = start_kernels.make_core("tiny")
    warm, config = start_kernels.make_core("tiny")
    executor: Any = warm._executor
    warm_up(executor, config)
    assert not executor._graphs._shelf._graphs
    assert not executor._rows.last_token_R[1:].any()
    assert tokens(warm) == tokens(cold)


def test_after_a_rehearsal_that_fails_kernels_are_launched_again() -> None:
    stock = JITFunction.run
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), api.rehearsal(1):
            assert JITFunction.run is not stock
            raise ZeroDivisionError
        assert JITFunction.run is stock


def test_a_rehearsal_that_fails_costs_no_more_than_time(caplog: pytest.LogCaptureFixture) -> None:
    cold, _ = start_kernels.make_core("tiny")
    warm, config = start_kernels.make_core("tiny")
    executor: Any = warm._executor

    def fail(plans: object, threads: int) -> None:
        raise OSError("no compiler")

    executor.rehearse = fail
    warm_up(executor, config)
    assert "no compiler" in caplog.text and "when it is needed" in caplog.text
    assert tokens(warm) == tokens(cold)


@pytest.mark.slow
def test_a_rehearsal_compiles_all_that_first_requests_and_graphs_need(tmp_path: Path) -> None:
    """In another process, for here Triton is an interpreter; compiled for a GPU that is not there."""
    command = [sys.executable, "-m", "benchmarks.start_kernels", "--model", "110m"]
    command += ["--threads", "2", "--json", str(tmp_path / "found.json")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    first, *later = results["asked"].values()
    assert {"_decode", "_prefill", "_plan", "_narrow", "_thresholds", "_draw", "_decode_inputs"} <= set(first)
    assert len(later) == 4 and not any(later)
    assert sorted(row["kernel"] for row in results["compiled"]) == sorted(first)
