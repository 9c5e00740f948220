"""benchmarks.compare without servers: what is said of runs, which runs are made, how the page is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import processes
from benchmarks.compare import gguf_files, page
from benchmarks.compare.__main__ import main
from benchmarks.compare.bounds import most_tokens_per_s
from benchmarks.compare.checkpoints import END, vocabulary, write_checkpoint
from benchmarks.compare.engines import UNQUANTISED, Engine, fastest_type
from benchmarks.compare.loads import Figures, Load, figures
from benchmarks.compare.measure import Findings, Plan, Rounds
from benchmarks.compare.serving import DidNotStart, Launch, Running, last_words, running
from benchmarks.compare.statistics import Summary, compare, undisturbed
from benchmarks.limits import Limits, decode_weights
from benchmarks.models import CONFIGS, read_spec
from engine.text.tokenizer import Tokenizer
from server.bench.client import Record, RequestError
from server.bench.options import BenchOptions, LengthRange
from server.bench.report import Result


def summary(*values: float) -> Summary:
    return Summary.of(values)


def verdict(ours: Summary, theirs: Summary, *, higher_is_better: bool = True) -> str:
    found = compare(ours, {"peer": theirs}, higher_is_better=higher_is_better)
    assert found is not None
    return found.verdict


def test_a_summary_is_the_median_and_the_whole_width() -> None:
    found = summary(90, 110, 100)
    assert (found.median, found.low, found.high, found.count) == (100, 90, 110, 3)
    assert found.spread == pytest.approx(0.2)


def test_a_gap_under_the_wider_spread_is_a_tie() -> None:
    wide, narrow = summary(90, 100, 110), summary(114, 115, 116)
    assert verdict(narrow, wide) == "tie"
    assert verdict(wide, narrow) == "tie"
    assert verdict(summary(124, 125, 126), wide) == "ahead"
    assert verdict(wide, summary(124, 125, 126)) == "behind"


def test_for_latencies_less_is_ahead() -> None:
    assert verdict(summary(10, 10, 11), summary(20, 20, 21), higher_is_better=False) == "ahead"
    assert verdict(summary(20, 20, 21), summary(10, 10, 11), higher_is_better=False) == "behind"


def test_two_runs_allow_no_verdict() -> None:
    assert verdict(summary(200, 200), summary(100, 100, 100)) == "too few runs"
    assert verdict(summary(200, 200, 200), summary(100, 100)) == "too few runs"


def test_the_best_peer_is_the_one_to_beat() -> None:
    peers = {"slow": summary(1, 1, 1), "fast": summary(4, 4, 4)}
    fastest = compare(summary(2, 2, 2), peers, higher_is_better=True)
    quickest = compare(summary(2, 2, 2), peers, higher_is_better=False)
    assert fastest is not None and (fastest.peer, fastest.ratio) == ("fast", 0.5)
    assert quickest is not None and (quickest.peer, quickest.ratio) == ("slow", 2.0)
    assert compare(summary(2), {}, higher_is_better=True) is None


@pytest.mark.parametrize(
    ("taken", "best", "others"),
    [
        ([0.05], 0.05, []),
        ([0.5, 0.0], 0.0, [0.5]),
        ([0.5, 0.3, 0.4], 0.3, [0.5, 0.4]),
    ],
)
def test_a_disturbed_run_is_repeated_and_the_calmest_counts(
    taken: list[float], best: float, others: list[float]
) -> None:
    found = undisturbed(lambda attempt: taken[attempt], lambda cores: cores, limit_cores=0.1, attempts=3)
    assert found == (best, others)


def test_the_cpu_of_others_leaves_out_a_process_and_its_children() -> None:
    mine = processes.tree_cpu_s(os.getpid())
    assert os.getpid() in processes.tree(os.getpid())
    assert 0 < processes.cpu_s(os.getpid()) <= mine <= processes.machine_cpu_s()
    assert processes.tree_bytes(os.getpid()) > 0


def bench_result(*records: Record) -> Result:
    options = BenchOptions(requests=2, output_len=LengthRange(3, 3))
    return Result(options, "m", "ids", list(records))


def record(tokens: int, error: RequestError | None = None) -> Record:
    made = Record(0.0, 1.0, output_tokens=tokens, prompt_tokens=5, error=error)
    made.text_s.extend([0.5, 0.6, 0.8])
    return made


def test_figures_of_a_sound_run() -> None:
    found = figures(bench_result(record(3), record(3)), others_cores=0.25)
    assert (found.fault, found.tokens_per_s, found.others_cores) == ("", 6.0, 0.25)
    assert found.ttft_p50_s == 0.5
    assert found.gap_p50_s == pytest.approx(0.15)


def test_a_run_that_generated_less_than_asked_does_not_count() -> None:
    assert figures(bench_result(record(3), record(2)), 0.0).fault == "5 tokens generated of 6 asked"
    failed = figures(bench_result(record(3), record(0, RequestError("timeout"))), 0.0)
    assert failed.fault == "1 requests failed: timeout: timeout"


THREE = ("quire", "llama.cpp:f16", "vllm:float32")
LOADS = {"W1": Load(1, 1, 8, 8), "W2": Load(2, 4, 8, 8)}


@contextmanager
def fake_server(launch: Launch, log: Path) -> Iterator[Running]:
    if launch.model == "broken":
        raise DidNotStart("no such instruction")
    yield Running("http://fake", 1, ready_s=2.0, resident_bytes=3_000_000)


class FakeEngine(Engine):
    def launch(self, model: str) -> Launch:
        return Launch([str(self)], "broken" if self.variant == "broken" else model, {})


def fake_measure(load: Load, server: Running, launch: Launch, seed: int) -> Figures:
    speed = {"quire": 200.0, "llama.cpp:f16": 100.0}.get(launch.command[0], 50.0)
    return Figures(0.0, speed, 0.1, 0.2, 0.01, 0.02, 1.0)


def measured(
    *engines: str,
    file: Path | None = None,
    measure: Any = fake_measure,
    old: dict[str, Any] | None = None,
    cpu: str = "a CPU",
) -> dict[str, Any]:
    parsed = [Engine.parse(name) for name in engines]
    fakes = [FakeEngine(engine.server, engine.variant) for engine in parsed]
    plan = Plan(["110m"], fakes, LOADS, repeats=3, limit_cores=0.1, attempts=2)
    head = {
        "machine": {"cores": 2, "cpu": cpu, "python": "3.11", "torch": "2.13", "when": "2026-11-27T"},
        "versions": {"quire": "abc"},
        "models": ["110m"],
        "loads": {name: str(load) for name, load in LOADS.items()},
        "bounds": {"110m": {UNQUANTISED: {"W2": 400.0}}},
        "repeats": 3,
        "limit_cores": 0.1,
        "attempts": 2,
    }
    findings = Findings(head, file)
    if old is not None:
        findings.resume(old, plan)
    Rounds(plan, findings, lambda line: None, fake_server, measure).run()
    return findings.content


def test_engines_take_turns_in_another_order_each_round() -> None:
    runs = measured(*THREE)["runs"]
    assert [run["engine"] for run in runs if run["load"] == "W1"] == [
        *THREE, *THREE[1:], *THREE[:1], *THREE[2:], *THREE[:2],
    ]  # fmt: skip


def test_an_interrupted_comparison_goes_on_with_the_visits_that_are_not_whole() -> None:
    whole = measured("quire", "llama.cpp:f16")
    asked: list[tuple[str, int]] = []

    def note(load: Load, server: Running, launch: Launch, seed: int) -> Figures:
        asked.append((launch.command[0], seed))
        return fake_measure(load, server, launch, seed)

    lost = {**whole, "runs": whole["runs"][:-3], "starts": whole["starts"]}  # the last three of twelve runs
    again = measured("quire", "llama.cpp:f16", measure=note, old=lost)
    assert asked == [("quire", 20), ("quire", 21), ("llama.cpp:f16", 20), ("llama.cpp:f16", 21)]
    assert sorted(map(str, again["runs"])) == sorted(map(str, whole["runs"]))
    assert len(again["starts"]) == 6


def test_only_the_same_comparison_goes_on() -> None:
    old = measured("quire")
    with pytest.raises(ValueError, match="the machine is not the same"):
        measured("quire", old=old, cpu="another")
    with pytest.raises(ValueError, match=r"versions are .* and were"):
        measured("quire", old={**old, "versions": {"quire": "def"}})


def test_no_two_runs_of_a_server_have_the_same_prompts() -> None:
    seeds: list[int] = []

    def disturbed(load: Load, server: Running, launch: Launch, seed: int) -> Figures:
        seeds.append(seed)
        return Figures(1.0, 1.0)

    content = measured("quire", measure=disturbed)
    assert len(seeds) == len(set(seeds)) == 3 * 2 * 2
    assert all(run["disturbed"] and len(run["other_attempts"]) == 1 for run in content["runs"])


def test_quantised_weights_are_compared_among_themselves_and_on_w1() -> None:
    runs = measured("quire:int8", "llama.cpp:q8_0")["runs"]
    assert {(run["group"], run["load"]) for run in runs} == {("8 bits", "W1")}


def test_a_peer_that_does_not_start_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    content = measured("quire", "vllm:broken", file=tmp_path / "found.json")
    assert [row["reason"] for row in content["absent"]] == ["no such instruction"]
    assert json.loads((tmp_path / "found.json").read_text()) == content
    assert "`vllm:broken` did not start here: no such instruction" in page.render(content)


def test_the_page_compares_quire_with_the_best_peer() -> None:
    text = page.render(measured(*THREE))
    (row,) = [line for line in text.splitlines() if line.startswith("| W2 | quire |")]
    assert "| 200 (200-200) | 2.00 x llama.cpp:f16: ahead | 100 / 200 |" in row
    assert row.endswith("| 50% | 0.00 |")
    assert "| vllm:float32 | 2.0 (2.0-2.0) | 3 |" in text


def test_the_bound_counts_weights_prompts_and_keys() -> None:
    spec = read_spec("110m")
    reading = Limits(bytes_per_s=1e9, flops_per_s=1e30)
    weights = decode_weights(spec)
    kv_bytes = 2 * 12 * 4 * 64 * 2 * 2 * (8 + 10 + 4 / 2)  # of two clients, by half of their four tokens
    step_s = (weights * 12 / 8 + kv_bytes) / 1e9
    assert most_tokens_per_s(Load(2, 6, 8, 4, shared_len=10), spec, 12, reading) == pytest.approx(2 / step_s)

    multiplying = Limits(bytes_per_s=1e30, flops_per_s=1e9)
    below = (weights - 768 * 32_000) * 11 / 12 + 768 * 2 * 4 * 64  # of the last layer, keys and values
    prompts = 2 * below * (6 * 8 + 10) + 4 * 11 * 12 * 64 * (10 * 10 / 2 + 6 * 8 * (10 + 8 / 2))
    total_s = (prompts + 6 * 4 * 2 * weights) / 1e9
    found = most_tokens_per_s(Load(2, 6, 8, 4, shared_len=10), spec, 12, multiplying)
    assert found == pytest.approx(6 * 4 / total_s)


def test_a_failed_run_is_said_and_not_averaged() -> None:
    def failing(load: Load, server: Running, launch: Launch, seed: int) -> Figures:
        return Figures(0.0, 900.0, fault="2 requests failed")

    assert "| W1 | quire | failed: 2 requests failed |" in page.render(measured("quire", measure=failing))


def test_the_page_keeps_what_is_around_the_markers(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_page(file, measured("quire"))
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "| W1 | quire |" in text
    file.write_text("no markers")
    with pytest.raises(ValueError, match="no markers"):
        page.write_page(file, measured("quire"))


def test_results_are_shown_again_without_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, written = tmp_path / "found.json", tmp_path / "page.md"
    content = measured("quire", file=file)
    written.write_text(f"{page.BEGIN}{page.END}")
    main(["--from", str(file), "--page", str(written)])
    assert page.render(content) in capsys.readouterr().out
    assert page.render(content) in written.read_text()


def test_an_unknown_engine_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--engines", "quire", "ollama"])
    assert "unknown engine ollama; known: quire, llama.cpp, vllm, transformers" in capsys.readouterr().err


def test_engines_are_named_with_their_variant() -> None:
    assert str(Engine.parse("llama.cpp:q8_0")) == "llama.cpp:q8_0"
    assert str(Engine.parse("quire")) == "quire"
    assert fastest_type("llama.cpp", has_bf16=True) == "bf16"
    assert fastest_type("vllm", has_bf16=False) == "float32"
    assert Engine.parse("vllm:float32").group == Engine.parse("quire").group == UNQUANTISED
    with pytest.raises(ValueError, match="unknown engine ollama"):
        Engine.parse("ollama")


def test_a_server_that_ends_at_once_did_not_start(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    command = ["/bin/sh", "-c", "echo 'Error: no such model' >&2; echo bye; exit 3"]
    with (
        pytest.raises(DidNotStart, match="status 3: Error: no such model"),
        running(Launch(command, "m", {}), log),
    ):
        pass
    log.write_text("")
    assert last_words(log) == "it said nothing"


def test_names_and_vocabulary_of_llama_cpps_files() -> None:
    assert gguf_files.gguf_name("model.layers.7.self_attn.q_proj.weight") == "blk.7.attn_q.weight"
    assert gguf_files.gguf_name("lm_head.weight") == "output.weight"
    for ours, theirs in (("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
        assert gguf_files.gguf_name(f"model.layers.0.mlp.{ours}.weight") == f"blk.0.{theirs}.weight"
    for ours, theirs in (("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
        assert gguf_files.gguf_name(f"model.layers.0.self_attn.{ours}.weight") == f"blk.0.{theirs}.weight"
    assert gguf_files.gguf_name("model.layers.0.input_layernorm.weight") == "blk.0.attn_norm.weight"
    tokens = vocabulary(1000)
    assert len(set(tokens)) == 1000 and tokens[0] == END


def test_a_checkpoint_has_weights_of_known_names_and_a_tokenizer(tmp_path: Path) -> None:
    config = {**CONFIGS["qwen3-0.6b"], "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 300}
    write_checkpoint(tmp_path, {**config, "intermediate_size": 16, "head_dim": 8})
    weights = load_file(tmp_path / "model.safetensors")
    names = {gguf_files.gguf_name(name) for name in weights}
    assert {"token_embd.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_down.weight"} <= names
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "output.weight" not in names  # tied
    tokenizer = Tokenizer.from_dir(str(tmp_path))
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([299]) == " t299"


def test_rotary_pairs_are_brought_together() -> None:
    weight = torch.arange(8.0)[:, None]  # two heads of four dimensions
    assert gguf_files.pairs_together(weight, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
