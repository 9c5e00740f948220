"""The benchmarks for a GPU: each script's path in a dry run, the arithmetic of their bounds, the summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode, engine, gpu_correct, gpu_summary, limits, start
from benchmarks.kernels.attention import decode_shapes, prefill_shapes
from benchmarks.kernels.timing import Lab
from benchmarks.models import read_spec

ROOT = Path(__file__).resolve().parents[2]


def found(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    assert {"commit", "torch", "cpu"} <= record["machine"].keys() and record["settings"]["dry_run"]
    return record


def test_decode(tmp_path: Path) -> None:
    decode.main(["--dry-run", "--deterministic", "both", "--json", str(tmp_path / "found.json")])
    record = found(tmp_path / "found.json")
    modes = [(row["batch"], row["deterministic"]) for row in record["results"]]
    assert modes == [(1, False), (2, False), (1, True), (2, True)]
    costs = [row["step_ms"] for row in record["results"]]
    assert record["results"][3]["deterministic_cost"] == pytest.approx(costs[3] / costs[1] - 1)
    for row in record["results"]:
        assert row["all_graphs"] and row["runs"] == {"graph decode": 12}
        assert row["context"] > 40 and row["step_ms"] > 0
        limit = limits.Limits(**record["limits"])
        bound_s = limits.least_decode_s(read_spec("tiny"), row["batch"], row["context"], limit)
        assert row["share_of_bound"] == pytest.approx(bound_s / row["step_ms"] * 1e3)


def test_workload(tmp_path: Path) -> None:
    engine.main(["--dry-run", "--json", str(tmp_path / "found.json")])
    (row,) = found(tmp_path / "found.json")["results"]
    assert row["output_tokens"] > 15 and row["step_runs"]["graph decode"] > 3


@pytest.mark.slow
def test_start(tmp_path: Path) -> None:
    start.main(["--dry-run", "--json", str(tmp_path / "found.json")])
    first, second = found(tmp_path / "found.json")["results"]
    assert first["kernels"] == "not compiled yet" and second["kernels"] == "compiled before"
    for row in (first, second):
        assert 0 < row["imports_s"] < row["ready_s"] < row["first_token_s"]


def test_what_a_step_reads_is_what_the_models_have() -> None:
    assert 2 * limits.decode_weights(read_spec("qwen3-0.6b")) == pytest.approx(1.19e9, rel=0.01)
    assert 2 * limits.decode_weights(read_spec("llama-3.1-8b")) == pytest.approx(15.0e9, rel=0.01)


def test_bounds_are_those_worked_out_by_hand() -> None:
    h200 = limits.Limits(4.3e12, 790e12)
    for model, batch, least_ms in (
        ("qwen3-0.6b", 1, 0.305),
        ("qwen3-0.6b", 32, 1.15),
        ("llama-3.1-8b", 1, 3.52),
        ("llama-3.1-8b", 256, 12.9),  # more rows than the bandwidth can feed: the products take longer
    ):
        least_s = limits.least_decode_s(read_spec(model), batch, 1024, h200)
        assert 1e3 * least_s == pytest.approx(least_ms, rel=0.02)


def test_idle_is_what_no_kernel_covers() -> None:
    assert decode.idle([]) == 0
    assert decode.idle([(0, 5), (5, 9)]) == 0
    assert decode.idle([(10, 12), (0, 5), (1, 3), (20, 21)]) == 5 + 8


def test_the_summary_knows_what_was_reached(tmp_path: Path) -> None:
    rows = [
        {"model": "qwen3-0.6b", "batch": 1, "share_of_bound": 0.6, "idle_us": 90.0, "deterministic": False},
        {"model": "qwen3-0.6b", "batch": 32, "share_of_bound": 0.4, "idle_us": 15.0, "deterministic": False},
        {"model": "qwen3-0.6b", "batch": 32, "deterministic_cost": 0.2, "deterministic": True},
    ]
    machine = {"gpu": "NVIDIA H200", "driver": "580.1", "commit": "abc"}
    (tmp_path / "gpu-decode-qwen3-0.6b.json").write_text(json.dumps({"results": rows, "machine": machine}))
    lines = {line[:58].strip(): line for line in gpu_summary.lines(tmp_path)}
    assert lines["decode, qwen3-0.6b, 1 x 1k: % of bound"].endswith("reached")
    assert lines["decode, qwen3-0.6b, 1 x 1k: GPU idle, us a step"].endswith("first goal")
    assert lines["decode, qwen3-0.6b, 32 x 1k: % of bound"].endswith("missed")
    assert lines["decode, qwen3-0.6b, 32 x 1k: GPU idle, us a step"].endswith("reached")
    assert lines["decode, qwen3-0.6b, 256 x 1k: % of bound"].endswith("not measured")
    assert lines["deterministic, qwen3-0.6b, 32 x 1k: % more time"].endswith("first goal")
    assert "NVIDIA H200, driver 580.1, commit abc" in list(gpu_summary.lines(tmp_path))[-1]


def test_the_summary_leaves_dry_runs_out(tmp_path: Path) -> None:
    rows = [{"model": "qwen3-0.6b", "batch": 1, "share_of_bound": 0.6, "deterministic": False}]
    found = {"results": rows, "settings": {"dry_run": True}}
    (tmp_path / "gpu-decode-qwen3-0.6b.json").write_text(json.dumps(found))
    (tmp_path / "gpu-correct.json").write_text(json.dumps(found))
    tests, _, *figures = list(gpu_summary.lines(tmp_path))[:-2]
    assert tests == "tests on the GPU: not run"
    assert all(line.endswith("not measured") for line in figures)


GPU_TESTS = """
import os
import pytest

pytestmark = pytest.mark.gpu

def test_good(): pass
def test_other(): pytest.skip("not here")
def test_bad(): assert 1 == 2

@pytest.fixture
def broken(): raise OSError

def test_of_a_broken_fixture(broken): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(("last", "finished"), [("pass", True), ("os._exit(9)", False)])
def test_the_tests_are_counted_also_when_they_are_stopped(last: str, finished: bool, tmp_path: Path) -> None:
    tests, found = tmp_path / "test_some.py", tmp_path / "gpu-correct.json"
    tests.write_text(GPU_TESTS + f"def test_last(): {last}\n")
    command = [sys.executable, "-m", "benchmarks.gpu_correct", "--workers", "0", "--json", str(found)]
    done = subprocess.run([*command, str(tests)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == (1 if finished else 9), done.stdout
    record = json.loads(found.read_text())
    assert {"commit", "torch", "cpu"} <= record["machine"].keys()
    (counts,) = record["results"]
    names = [name.rpartition("::")[2] for name in counts.pop("failures")]
    assert names == ["test_bad", "test_of_a_broken_fixture"]
    assert 0 < counts.pop("seconds") < 60
    assert counts == {"finished": finished, "passed": 1 + finished, "failed": 2, "skipped": 1}
    first, *failed, _ = [line for line in gpu_summary.lines(tmp_path) if "test" in line or "correct" in line]
    assert first.startswith(f"tests on the GPU: {1 + finished} passed, 2 failed, 1 skipped in ")
    assert first.endswith("; STOPPED before the last one") != finished
    assert [line.rpartition("::")[2] for line in failed] == names


def test_the_kernels_of_the_goals_are_measured_first() -> None:
    lab = Lab(dry=False)
    shapes = {"decode": list(decode_shapes(lab)), "prefill": list(prefill_shapes(lab))}
    goals = [dict(goal.where) for goal in gpu_summary.GOALS if goal.file == "gpu-kernels.json"]
    assert len(goals) == 4
    for goal in goals:
        assert goal["shape"] in [str(shape) for shape in shapes[goal["op"]][:3]]


def test_each_file_of_the_summary_is_written_by_the_script() -> None:
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    written = script.replace("$small", "qwen3-0.6b").replace("$large", "llama-3.1-8b")
    for goal in gpu_summary.GOALS:
        assert f'"$out/{goal.file}"' in written
    assert '"$out/gpu-correct.json"' in written


def test_the_script_names_its_parts() -> None:
    done = subprocess.run([ROOT / "benchmarks/gpu.sh", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    for part in ("correct", "kernels", "decode", "start", "workload", "peer", "summary"):
        assert f"  {part} " in done.stdout


# What the server needs and a machine with a GPU may lack.
LACKING = """
import importlib.abc, sys

class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in %r:
            raise ModuleNotFoundError(f"no {name}", name=name)

sys.meta_path.insert(0, Lacking())
"""
SERVERS = (
    "fastapi", "uvicorn", "starlette", "pydantic", "prometheus_client", "jinja2", "msgspec", "zmq",
    "llguidance", "tokenizers", "huggingface_hub", "transformers", "httpx",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "more"),
    [
        ("decode", ("safetensors",)),
        ("kernels", ("safetensors",)),
        ("workload", ("safetensors",)),
        ("start", ()),
    ],
)
def test_a_part_needs_little_more_than_torch(part: str, more: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(LACKING % ((*SERVERS, *more),))
    environment = {**os.environ, "PYTHON": sys.executable, "QUIRE_RESULTS": str(tmp_path)}
    environment |= {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore", "TRITON_INTERPRET": "1"}
    command = [ROOT / "benchmarks/gpu.sh", "--dry-run", part]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("gpu-*.json")]
    assert records and all("commit" in record["machine"] for record in records)


@pytest.mark.slow
def test_the_gpu_tests_are_found_without_the_plugins_of_the_suite() -> None:
    command = [sys.executable, "-m", "pytest", "-c", "benchmarks/gpu.ini", "--rootdir", ".", "-m", "gpu"]
    command += ["--collect-only", "-q", *gpu_correct.TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "test_engine_cuda.py::test_graphs_say_what_launches_say" in done.stdout
    assert "test_engine_deterministic.py::test_alone_and_in_a_batch[cuda" in done.stdout
    assert "test_layer.py::test_deterministic_logits" in done.stdout
