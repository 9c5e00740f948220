"""Streamed tokens per second through HTTP, with an executor that computes nothing.

Three processes, all real but the model: the load generator, the API process (`server.app` around a
`ProcessClient`) and the engine process (`EngineCore` around an executor that draws a token at once). So what
is measured is all that stands between the sampled token ids and the caller.

Unpaced, the engine runs ahead and the API process sends several tokens in one chunk: that is the ceiling in
tokens. With `--step-ms` a step takes that long, so each token is a chunk of its own, as with a model: raise
the pace until it is no longer kept. Both are measured by default.

With `--beside-mb` prompts of that size are posted one after another, in every second round, while the streams
run: what they cost the others is the difference of the longest time between two chunks of a round. A prompt
of more tokens than `--context` is tokenised and then refused.

    python -m benchmarks.frontend [--streams 256] [--tokens 400] [--step-ms 0 12] [--api chat] [--json FILE]
    python -m benchmarks.frontend --beside-mb 1 --context 1000000 --streams 16 --step-ms 12 [--pairs 8]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, processes
from engine.config import CacheConfig, EngineConfig, EngineOptions, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.plan import StepPlan, StepResult, TokenMasks
from engine.text.tokenizer import Tokenizer
from engine.types import EngineInfo

GOAL_TOKENS_PER_S = 15_000
BLOCK_SIZE = 32
MAX_MODEL_LEN = 4096
WORDS = ("the", "cache", "holds\n", "blocks;", '"wait"', "<b>in</b>", "über", "12", "{x:", "[1,", "2]}")


class _Drawn(NamedTuple):
    token_ids: list[int]
    due_s: float

    def result(self) -> StepResult:
        left_s = self.due_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        return StepResult(self.token_ids)


class PacedExecutor:
    """Draws ordinary words of the vocabulary, one after another, and takes its time.

    Args:
        step_s: from one step's tokens to the next one's.
    """

    def __init__(self, token_ids: list[int], step_s: float) -> None:
        self._token_ids = token_ids
        self._step_s = step_s
        self._at = 0
        self._due_s = 0.0

    def forward(self, plan: StepPlan) -> None:
        self._due_s = max(self._due_s + self._step_s, time.perf_counter())

    def prepare(self) -> bool:
        return False

    def sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> _Drawn:
        ids, first = self._token_ids, self._at
        count = sum(sequence.samples for sequence in plan.sequences)
        self._at = (first + count) % len(ids)
        return _Drawn([ids[(first + i) % len(ids)] for i in range(count)], self._due_s)


def build_engine(
    options: EngineOptions, progress: Callable[[int, int], None]
) -> tuple[EngineCore, EngineInfo]:
    """The factory that the engine process calls. The model's name is the pace, in milliseconds a step."""
    step_s = float(options.served_model_name or 0) / 1000
    tokenizer = Tokenizer.from_dir(options.model)
    assert tokenizer.byte_table is not None
    plain = [i for i, text in enumerate(tokenizer.byte_table) if text.isascii() and text.isalnum()]
    streams = options.max_num_seqs or 1
    max_model_len = options.max_model_len or MAX_MODEL_LEN
    blocks = 1 + (streams * MAX_MODEL_LEN + max_model_len) // BLOCK_SIZE
    config = EngineConfig(
        model=ModelConfig("instant", "float32", "cpu", max_model_len, tokenizer.vocab_size, (), seed=0),
        cache=CacheConfig(BLOCK_SIZE, blocks, 1, prefix_caching=True, dtype="float32"),
        scheduler=SchedulerConfig(streams, 8192, 4 * streams),
    )
    info = EngineInfo(
        model="instant", architecture="none", dtype="float32", device="cpu", backend="none",
        vocab_size=tokenizer.vocab_size, max_model_len=max_model_len, eos_token_ids=(), block_size=BLOCK_SIZE,
        num_blocks=blocks, kv_dtype="float32", weight_bytes=0, kv_bytes=0, max_num_seqs=streams,
        max_num_batched_tokens=8192,
        max_queued_requests=4 * streams, prefix_caching=True, largest_request_tokens=max_model_len,
    )  # fmt: skip
    return EngineCore(config, PacedExecutor(plain, step_s)), info


def serve(model: str, streams: int, step_ms: float, max_model_len: int) -> None:
    """The API process: prints its port and serves until it is told to stop."""
    import uvloop

    from engine.client import ProcessClient
    from engine.text.chat import ChatTemplate
    from server.app import create_app
    from server.port import listen
    from server.run import Server
    from server.settings import ServerSettings

    options = EngineOptions(
        model=model,
        served_model_name=f"{step_ms:g}",
        max_num_seqs=streams,
        max_model_len=max_model_len,
    )
    settings = ServerSettings(engine=options, model_name="instant", access_log=False)
    tokenizer = Tokenizer.from_dir(model)

    async def run(sock: Any) -> int:
        client = ProcessClient(options, tokenizer, factory="benchmarks.frontend:build_engine")
        app = create_app(client, settings, tokenizer, ChatTemplate.from_dir(model, tokenizer))
        port = sock.getsockname()[1]
        return await Server(app, settings).run_until_stopped(sock, lambda: print(port, flush=True))

    with listen("127.0.0.1", 0) as sock, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(run(sock)))


class Cpu:
    """CPU seconds of this process, the API process and the engine process."""

    def __init__(self, api_pid: int) -> None:
        (engine_pid,) = processes.children(api_pid)
        self._pids = {"client": os.getpid(), "api": api_pid, "engine": engine_pid}

    def read(self) -> dict[str, float]:
        return {name: processes.cpu_s(pid) for name, pid in self._pids.items()}


@contextmanager
def serving(args: argparse.Namespace, step_ms: float) -> Iterator[tuple[str, Cpu]]:
    """An API process and its engine, until the end of the block."""
    command = [sys.executable, "-m", "benchmarks.frontend", "--serve", "--model", args.model]
    streams = args.streams + bool(args.beside_mb)
    command += ["--streams", str(streams), "--step-ms", str(step_ms)]
    command += ["--context", str(args.context)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=machine.ROOT) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}", Cpu(server.pid)
        finally:
            server.terminate()


def measure(url: str, cpu: Cpu, args: argparse.Namespace) -> dict[str, Any]:
    """One run of the load generator, and what each process spent on it."""
    import uvloop

    from server.bench.drive import bench
    from server.bench.options import BenchOptions, LengthRange
    from server.bench.report import as_dict

    options = BenchOptions(
        url=url,
        api=args.api,
        requests=args.streams * args.rounds,
        concurrency=args.streams,
        warmup=args.streams,
        input_len=LengthRange(args.input_len, args.input_len),
        output_len=LengthRange(args.tokens, args.tokens),
        max_seconds=180,
        quiet=True,
    )
    before, begin_s = cpu.read(), time.perf_counter()
    result = uvloop.run(bench(options))
    wall_s = time.perf_counter() - begin_s
    spent = {name: after - before[name] for name, after in cpu.read().items()}
    warmup_tokens = options.warmup * args.tokens
    return {"bench": as_dict(result), "warmup_tokens": warmup_tokens, "cpu_s": spent, "wall_s": wall_s}


async def longest_gap(url: str, args: argparse.Namespace, beside: bytes) -> float:
    """Streams for one round; `beside` is posted meanwhile, again and again, if there is any.

    Returns:
        The longest time between two chunks of a stream, in milliseconds.
    """
    from server.bench.client import ApiClient

    client, path = ApiClient(url, None, 120), "/v1/completions"
    fields = {"prompt": "one two", "max_tokens": args.tokens, "stream": True}
    streams = [
        asyncio.create_task(client.stream(path, json.dumps(fields).encode())) for _ in range(args.streams)
    ]
    while beside and not all(stream.done() for stream in streams):
        await asyncio.sleep(0.2)
        record = await client.stream(path, beside)
        if record.error is not None and not record.error.kind.startswith("HTTP 400"):
            raise record.error
    records = await asyncio.gather(*streams)
    client.close()
    return 1000 * max(after - before for r in records for before, after in pairwise(r.text_s))


def measure_beside(url: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Rounds without and with long prompts, in turns."""
    import uvloop

    gaps: dict[str, list[float]] = {"alone": [], "beside": []}
    for number in range(args.pairs):
        words = random.Random(number).choices(WORDS, k=int(args.beside_mb * 2**18))
        text = " ".join(words)[: int(args.beside_mb * 2**20)]
        body = json.dumps({"prompt": text, "max_tokens": 1, "stream": True}, ensure_ascii=False).encode()
        for name, posted in (("alone", b""), ("beside", body)):
            gaps[name].append(uvloop.run(longest_gap(url, args, posted)))
        print(f"longest gap {gaps['alone'][-1]:.1f} ms alone, {gaps['beside'][-1]:.1f} ms beside", flush=True)
    for find in (statistics.median, min):
        alone, beside = find(gaps["alone"]), find(gaps["beside"])
        print(f"{find.__name__}: {alone:.1f} alone, {beside:.1f} beside: {beside - alone:+.1f} ms")
    return gaps


def describe(run: dict[str, Any]) -> str:
    bench = run["bench"]
    latency = bench["latency"]
    tokens = bench["output_tokens"] + run["warmup_tokens"]
    costs = ", ".join(f"{name} {1e6 * spent / tokens:.1f}" for name, spent in run["cpu_s"].items())
    per_chunk = bench["output_tokens"] / max(1, bench["text_chunks"])
    failed = bench["requests"]["failed"] + bench["requests"]["not_sent"]
    return (
        f"{bench['output_tokens_per_s']:>9,.0f} tokens/s, {per_chunk:.2f} a chunk; "
        f"gap p50 {1000 * latency['gap_s']['p50']:.1f} p99 {1000 * latency['gap_s']['p99']:.1f} ms; "
        f"{failed} failed; CPU us/token: {costs}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Streamed tokens per second without a model.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="per request")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="requests per stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0, 12])
    parser.add_argument("--beside-mb", type=float, default=0.0, help="size of prompts posted meanwhile")
    parser.add_argument("--context", type=int, default=MAX_MODEL_LEN, help="tokens that a request may have")
    parser.add_argument("--pairs", type=int, default=8, help="with --beside-mb: rounds without and with")
    parser.add_argument("--api", choices=("completions", "chat"), default="completions")
    parser.add_argument("--model", help="whose tokenizer to use (default: the built-in model's)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        from engine import builtin

        args.model = str(builtin.path())
    if args.serve:
        serve(args.model, args.streams, args.step_ms[0], args.context)
    results: dict[str, Any] = {}
    for step_ms in args.step_ms:
        offered = f"{args.streams / step_ms * 1000:,.0f} tokens/s offered" if step_ms else "as fast as it can"
        print(f"{args.streams} streams, {step_ms:g} ms a step ({offered})")
        with serving(args, step_ms) as (url, cpu):
            if args.beside_mb:
                results[f"{step_ms:g}"] = measure_beside(url, args)
                continue
            runs = []
            for _ in range(args.repeats):
                runs.append(measure(url, cpu, args))
                print(describe(runs[-1]), flush=True)
        median = statistics.median(run["bench"]["output_tokens_per_s"] for run in runs)
        verdict = "reached" if median > GOAL_TOKENS_PER_S else "missed"
        print(f"median {median:,.0f} tokens/s; goal {GOAL_TOKENS_PER_S:,}: {verdict}\n")
        results[f"{step_ms:g}"] = {"median_tokens_per_s": median, "runs": runs}
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine.describe(), "step_ms": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
