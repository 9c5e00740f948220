"""Which servers are compared, and each one's best settings for this machine and these loads.

An engine is NAME or NAME:VARIANT. The variant says how weights are held: for the servers a value of their own
flag (Quire's `--quantization`; `--dtype`), for llama.cpp the kind of file. Left out, it is what is fastest on
this CPU: where it has no bf16 instructions, a peer computes in the type that it is quicker in.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.compare.checkpoints import checkpoint
from benchmarks.compare.gguf_files import gguf_file
from benchmarks.compare.loads import LONGEST_TOKENS, MOST_CLIENTS
from benchmarks.compare.serving import DidNotStart, Launch

PEERS = machine.ROOT / "build" / "peers"
UNQUANTISED = "not quantised"
BITS = {"int8": "8 bits", "q8_0": "8 bits", "int4": "4 bits", "q4_0": "4 bits"}


@dataclass(frozen=True, order=True)
class Engine:
    """One contender: a server and how its weights are held."""

    server: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Engine:
        """From NAME or NAME:VARIANT. Raises ValueError."""
        server, _, variant = text.partition(":")
        if server not in SERVERS:
            raise ValueError(f"unknown engine {server}; known: {', '.join(SERVERS)}")
        return cls(server, variant or fastest_type(server, cpu_has_bf16()))

    def __str__(self) -> str:
        return f"{self.server}:{self.variant}" if self.variant else self.server

    @property
    def group(self) -> str:
        """Engines are compared inside a group: those whose weights take about the same space."""
        return BITS.get(self.variant, UNQUANTISED)

    def launch(self, model: str) -> Launch:
        """Raises DidNotStart where the server is not installed."""
        return SERVERS[self.server](model, self.variant)

    def version(self) -> str:
        """Of what is installed, as its install command wrote it."""
        if self.server == "quire":
            return machine.commit()
        file = PEERS / self.server / "version"
        return file.read_text().strip() if file.exists() else "not installed"


def fastest_type(server: str, has_bf16: bool) -> str:
    """The variant that stands for a server's 16-bit weights; Quire chooses by itself."""
    if server == "quire":
        return ""
    with_bf16, without = ("bf16", "f16") if server == "llama.cpp" else ("bfloat16", "float32")
    return with_bf16 if has_bf16 else without


def cpu_has_bf16() -> bool:
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def threads() -> int:
    return len(os.sched_getaffinity(0))


def kv_gib(model: str) -> int:
    """GiB of KV cache that hold the longest request of every client, in 16 bits."""
    config: dict[str, int] = json.loads((checkpoint(model) / "config.json").read_text())
    numbers_a_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return math.ceil(2 * numbers_a_token * MOST_CLIENTS * LONGEST_TOKENS / 2**30)


def _quire(model: str, variant: str) -> Launch:
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        str(checkpoint(model)),
        "--served-model-name",
        model,
    ]
    command += ["--port", "{port}", "--no-access-log", "--kv-cache-memory", f"{kv_gib(model)}GiB"]
    command += ["--quantization", variant] if variant else []
    return Launch(command, model, {})


def _llama_cpp(model: str, variant: str) -> Launch:
    home = _home("llama.cpp", "benchmarks/peers/llama_cpp.sh")
    file = gguf_file(checkpoint(model), variant, home)
    command = [str(home / "build/bin/llama-server"), "-m", str(file), "-a", model, "--port", "{port}"]
    command += ["-t", str(threads()), "-np", str(MOST_CLIENTS), "-c", str(MOST_CLIENTS * LONGEST_TOKENS)]
    command += ["-fa", "on", "--cache-prompt", "--no-ui"]
    return Launch(command, model, {})


def _vllm(model: str, variant: str) -> Launch:
    home = _home("vllm", "benchmarks/peers/vllm.sh")
    command = [str(home / "bin/vllm"), "serve", str(checkpoint(model)), "--served-model-name", model]
    command += ["--port", "{port}", "--dtype", variant, "--max-model-len", str(LONGEST_TOKENS)]
    command += ["--max-num-seqs", str(MOST_CLIENTS), "--enable-prefix-caching"]
    preloads = [*home.glob("tcmalloc/**/libtcmalloc_minimal.so.4"), *home.glob("lib/libiomp5.so")]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads() - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib(model)),
        "LD_PRELOAD": ":".join(map(str, preloads)),
        "VLLM_CACHE_ROOT": str(home / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Launch(command, model, environment)


def _transformers(model: str, variant: str) -> Launch:
    home = _home("transformers", "benchmarks/peers/transformers.sh")
    folder = str(checkpoint(model))
    command = [str(home / "bin/transformers"), "serve", folder, "--continuous-batching", "--port", "{port}"]
    command += ["--host", "127.0.0.1", "--dtype", variant]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads())}
    return Launch(command, folder, environment, takes_ids=False)


def _home(server: str, install: str) -> Path:
    """Where a peer is installed. The version is written last, so half an installation counts as none."""
    home = PEERS / server
    if not (home / "version").exists():
        raise DidNotStart(f"not installed: run {install}")
    return home


SERVERS: dict[str, Callable[[str, str], Launch]] = {
    "quire": _quire,
    "llama.cpp": _llama_cpp,
    "vllm": _vllm,
    "transformers": _transformers,
}
