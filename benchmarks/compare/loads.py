"""The loads, and one run of one of them: figures, whether they are sound, what else took CPU."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import uvloop

from benchmarks import processes
from benchmarks.compare.serving import Launch, Running
from server.bench.client import RequestError
from server.bench.drive import bench
from server.bench.options import BenchOptions, LengthRange
from server.bench.report import Distribution, Result

MOST_CLIENTS = 16
LONGEST_TOKENS = 2304  # of a prompt and its answer
MOST_SECONDS = 3600.0


@dataclass(frozen=True)
class Load:
    """A closed loop: each client sends its next request when its last one has ended."""

    clients: int
    requests: int
    input_len: int
    output_len: int
    shared_len: int = 0

    def __str__(self) -> str:
        clients = "1 client" if self.clients == 1 else f"{self.clients} clients"
        shared = f"{self.shared_len} shared + " if self.shared_len else ""
        return f"{clients}, {shared}{self.input_len} in, {self.output_len} out, {self.requests} requests"

    def quick(self) -> Load:
        """One request for each client."""
        return Load(self.clients, self.clients, self.input_len, self.output_len, self.shared_len)


LOADS = {
    "W1": Load(clients=1, requests=8, input_len=128, output_len=128),
    "W2": Load(clients=16, requests=48, input_len=256, output_len=128),
    "W3": Load(clients=16, requests=48, input_len=64, output_len=64, shared_len=1024),
    "W4": Load(clients=8, requests=16, input_len=2048, output_len=64),
}


@dataclass
class Figures:
    """One run. Times in seconds; -1 where there is none.

    Attributes:
        gap: between chunks with text: the inter-token latency where a chunk is a token.
        tokens_per_chunk: how many tokens a chunk holds on average.
        others_cores: cores that anything but the server and the load generator took, on average.
        fault: why the run does not count: a request failed, or generated another number of tokens than asked.
    """

    others_cores: float
    tokens_per_s: float = 0.0
    ttft_p50_s: float = -1.0
    ttft_p95_s: float = -1.0
    gap_p50_s: float = -1.0
    gap_p95_s: float = -1.0
    tokens_per_chunk: float = 0.0
    input_tokens: int = 0
    cached_tokens: int = 0
    fault: str = ""


def run_load(load: Load, server: Running, launch: Launch, seed: int) -> Figures:
    """Runs a load against a running server.

    Args:
        seed: of the prompts; another one for each run of a server, lest its cache has them.
    """
    options = BenchOptions(
        url=server.url,
        model=launch.model,
        requests=load.requests,
        concurrency=load.clients,
        warmup=min(2, load.clients),
        input_len=LengthRange(load.input_len, load.input_len),
        output_len=LengthRange(load.output_len, load.output_len),
        shared_prefix_len=load.shared_len,
        prompt_form="ids" if launch.takes_ids else "text",
        ignore_eos=launch.takes_ids,
        seed=seed,
        max_seconds=MOST_SECONDS,
        timeout_s=MOST_SECONDS,
        quiet=True,
    )
    others = OthersCpu(server.pid)
    try:
        result = uvloop.run(bench(options))
    except RequestError as error:
        return Figures(fault=f"{error.kind}: {error.message}"[:300], others_cores=others.cores())
    return figures(result, others.cores())


class OthersCpu:
    """What all processes but a server and this one take, from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._begin_s = time.perf_counter()
        self._begin_cpu_s = self._others_s()

    def cores(self) -> float:
        spent_s = self._others_s() - self._begin_cpu_s
        return max(0.0, spent_s / (time.perf_counter() - self._begin_s))

    def _others_s(self) -> float:
        return processes.machine_cpu_s() - processes.tree_cpu_s(self._pid) - processes.cpu_s(os.getpid())


def figures(result: Result, others_cores: float) -> Figures:
    """Of what the load generator measured."""
    ttft, gap = result.ttft_s(), result.gap_s()
    return Figures(
        tokens_per_s=result.per_second(result.output_tokens),
        ttft_p50_s=_part(ttft, "p50"),
        ttft_p95_s=_part(ttft, "p95"),
        gap_p50_s=_part(gap, "p50"),
        gap_p95_s=_part(gap, "p95"),
        tokens_per_chunk=result.output_tokens / max(1, result.text_chunks),
        input_tokens=result.prompt_tokens,
        cached_tokens=result.cached_tokens,
        others_cores=others_cores,
        fault=_fault(result),
    )


def _part(found: Distribution | None, name: str) -> float:
    return float(getattr(found, name)) if found is not None else -1.0


def _fault(result: Result) -> str:
    errors = result.errors()
    if errors:
        kind, (count, message) = next(iter(errors.items()))
        return f"{count} requests failed: {kind}: {message}"[:300]
    asked = result.options.requests * result.options.output_len.low
    if result.output_tokens != asked:
        return f"{result.output_tokens} tokens generated of {asked} asked"
    return ""
