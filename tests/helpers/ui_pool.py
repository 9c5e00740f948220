"""A large pool without a model: requests come, share prefixes, decode, end, and push each other out.

    python -m tests.helpers.ui_pool [--blocks N] [--churn SHARE] [--seed N] [the flags of `quire serve`]

Serves the real app, so that the live page can be looked at and measured with as many blocks as wanted.
`--churn` changes that share of all blocks in every frame besides, at random: more than any engine would.
Prints "ready PORT" on stdout once it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop

from engine.types import EngineSnapshot
from engine.views import Lane, PoolFrame
from server.app import create_app
from server.log import configure_logging, log_options
from server.port import listen
from server.run import Server
from tests.helpers.fake_client import INFO, FakeClient, FakeTemplate, FakeTokenizer
from tests.helpers.settings import parse_args

TICK_S = 0.2
BLOCK_SIZE = 16
TENANTS = ("chat", "search", "batch")
COLUMNS = ("refs", "owners", "tenants", "positions", "parents", "taken", "idle")
FAMILIES = 60
LANES_TOLD = 256


@dataclass(slots=True)
class _Request:
    """One simulated request; all figures in blocks, but for the ages."""

    number: int
    family: int
    tenant: int
    prompt: int
    output: int
    born_s: float
    cached: int = 0
    held: list[int] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        return self.prompt + self.output


class SimulatedPool:
    """Columns of the pool, and the requests that change them."""

    def __init__(self, blocks: int, churn: float = 0.0, seed: int = 1) -> None:
        self.rows = blocks + 1
        self.churn = churn
        self.random = random.Random(seed)
        self.numpy_random = np.random.default_rng(seed)
        self.refs, self.owners, self.tenants, self.positions, self.parents, self.taken, self.idle = (
            np.zeros(self.rows, np.uint32) for _ in COLUMNS
        )
        self.kept = np.zeros(self.rows, np.uint8)
        self.free = list(range(blocks, 0, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.prefixes: dict[tuple[int, int], int] = {}  # (family, position) -> block
        self.named: dict[int, tuple[int, int]] = {}
        self.live: list[_Request] = []
        self.queue: list[_Request] = []
        self.changed: set[int] = set()
        self.now_s = 600.0
        self.counts: dict[str, int] = dict.fromkeys(
            ("requests", "queries", "hits", "prompt", "generated", "evicted"), 0
        )
        self.at_once = max(2, min(256, blocks // 160))
        for _ in range(200):
            self.tick(fast=True)

    def tick(self, fast: bool = False) -> None:
        """A fifth of a second of work."""
        self.now_s += TICK_S
        while len(self.live) + len(self.queue) < self.at_once * 1.15:
            self._arrive()
        while self.queue and len(self.live) < self.at_once:
            self._admit(self.queue.pop(0))
        for request in list(self.live):
            self._work(request, 40 if fast else 6)
        if self.churn and not fast:
            self._churn()

    def _arrive(self) -> None:
        self.counts["requests"] += 1
        family = min(FAMILIES - 1, int(self.random.expovariate(0.09)))
        blocks = max(2, int(self.random.lognormvariate(3.8, 0.7)))
        output = self.random.randint(2, 24)
        tenant = family % len(TENANTS)
        request = _Request(self.counts["requests"], family, tenant, blocks, output, self.now_s)
        self.queue.append(request)

    def _admit(self, request: _Request) -> None:
        common = 6 + request.family * 7 % 40
        for position in range(min(common, request.prompt - 1)):
            block = self.prefixes.get((request.family, position))
            if block is None:
                break
            self.cached.pop(block, None)
            self.refs[block] += 1
            self.idle[block] = 0
            self.changed.add(block)
            request.held.append(block)
        request.cached = len(request.held)
        self.counts["queries"] += request.prompt * BLOCK_SIZE
        self.counts["hits"] += request.cached * BLOCK_SIZE
        self.live.append(request)

    def _work(self, request: _Request, pace: int) -> None:
        prefill = len(request.held) < request.prompt
        steps = min(pace, request.prompt - len(request.held)) if prefill else self.random.random() < 0.3
        for _ in range(int(steps)):
            if not self._take(request):
                return
            self.counts["prompt" if prefill else "generated"] += BLOCK_SIZE
        if len(request.held) >= request.wanted:
            self._end(request)

    def _take(self, request: _Request) -> bool:
        if not self.free and not self.cached:
            return False
        block = self.free.pop() if self.free else self._evict()
        position = len(request.held)
        self.refs[block] = 1
        self.kept[block] = 1
        self.owners[block] = request.number
        self.tenants[block] = request.tenant
        self.positions[block] = position
        self.parents[block] = request.held[-1] if request.held else 0
        self.taken[block] = round(self.now_s * 10)
        self.idle[block] = 0
        self.changed.add(block)
        if position < 6 + request.family * 7 % 40:
            self.prefixes[request.family, position] = block
            self.named[block] = (request.family, position)
        request.held.append(block)
        return True

    def _evict(self) -> int:
        block, _ = self.cached.popitem(last=False)
        name = self.named.pop(block, None)
        if name is not None and self.prefixes.get(name) == block:
            del self.prefixes[name]
        self.counts["evicted"] += 1
        return block

    def _end(self, request: _Request) -> None:
        self.live.remove(request)
        for block in reversed(request.held):
            self.refs[block] -= 1
            self.changed.add(block)
            if self.refs[block] == 0:
                self.idle[block] = round(self.now_s * 10)
                self.cached[block] = None

    def _churn(self) -> None:
        """Gives blocks that nobody uses to somebody for a moment, and back: only the columns notice."""
        picked = self.numpy_random.random(self.rows) < self.churn
        picked[0] = False
        self.owners[picked] = self.numpy_random.integers(1, 1 << 20, int(picked.sum()))
        self.taken[picked] = round(self.now_s * 10)
        self.changed.update(np.flatnonzero(picked).tolist())

    def frame(self, sequence: int) -> PoolFrame:
        full = sequence == 0
        ids = np.arange(self.rows) if full else np.fromiter(sorted(self.changed), np.uint32)
        self.changed.clear()
        columns = {name: getattr(self, name)[ids].astype("<u4").tobytes() for name in COLUMNS}
        return PoolFrame(
            sequence,
            full,
            round(self.now_s * 10),
            TENANTS,
            b"" if full else ids.astype("<u4").tobytes(),
            columns["refs"],
            self.kept[ids].tobytes(),
            columns["owners"],
            columns["tenants"],
            columns["positions"],
            columns["parents"],
            columns["taken"],
            columns["idle"],
            tuple(self._lane(request) for request in [*self.live, *self.queue][:LANES_TOLD]),
            max(0, len(self.live) + len(self.queue) - LANES_TOLD),
        )

    def _lane(self, request: _Request) -> Lane:
        held, prompt = len(request.held), request.prompt
        phase = "queued" if request in self.queue else "prefill" if held < prompt else "decode"
        tokens = BLOCK_SIZE
        return Lane(
            str(request.number),
            0,
            TENANTS[request.tenant],
            phase,
            prompt * tokens,
            request.cached * tokens,
            held * tokens,
            max(0, held - prompt) * tokens,
            held,
            0,
            self.now_s - request.born_s,
        )

    def snapshot(self) -> EngineSnapshot:
        shared, used = int((self.refs > 1).sum()), int((self.refs > 0).sum())
        hits, queries = self.counts["hits"], self.counts["queries"]
        missed = queries - hits
        sizes = {"0.5": 0.7, "1": 1.0, "2": 1.25, "4": 1.4, "8": 1.45}
        return EngineSnapshot(
            steps=round(self.now_s / 0.02),
            running=len(self.live),
            waiting=len(self.queue),
            blocks_total=self.rows - 1,
            blocks_in_use=used,
            blocks_shared=shared,
            blocks_cached=len(self.cached),
            blocks_free=len(self.free),
            tokens_held=used * BLOCK_SIZE,
            evicted_blocks={"capacity": self.counts["evicted"]},
            prefix_query_tokens=queries,
            prefix_hit_tokens=hits,
            whatif_hit_tokens={size: min(queries, int(hits * factor)) for size, factor in sizes.items()},
            prompt_tokens=missed,
            generated_tokens=self.counts["generated"],
            busy_s=self.now_s * 0.8,
        )


class PoolClient(FakeClient):
    """FakeClient whose pool is simulated; one clock for all viewers."""

    def __init__(self, pool: SimulatedPool) -> None:
        info = dataclasses.replace(INFO, num_blocks=pool.rows, block_size=BLOCK_SIZE)
        super().__init__(info=dataclasses.replace(info, num_blocks=2))
        self._info = info  # the fake's own small pool answers questions about single blocks
        self.simulated = pool

    async def watch_pool(self) -> AsyncIterator[PoolFrame]:
        for sequence in range(sys.maxsize):
            due_s = time.monotonic() + TICK_S
            yield self.simulated.frame(sequence)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            self.simulated.tick()

    def snapshot(self) -> EngineSnapshot:
        return self.simulated.snapshot()

    def public_id(self, number: str) -> str:
        return f"chatcmpl-{int(number) * 0x9E3779B97F4A7C15 % (1 << 96):024x}"


async def serve(arguments: list[str]) -> int:
    parser: Any = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--churn", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    own, rest = parser.parse_known_args(arguments)
    chosen = parse_args(rest, {})
    configure_logging(log_options(chosen))
    client = PoolClient(SimulatedPool(own.blocks, own.churn, own.seed))
    app = create_app(client, chosen, FakeTokenizer(), FakeTemplate())
    with listen(chosen.host, chosen.port) as sock:
        port = sock.getsockname()[1]
        return await Server(app, chosen).run_until_stopped(sock, lambda: print(f"ready {port}", flush=True))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(serve(sys.argv[1:])))
