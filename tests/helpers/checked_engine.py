"""`quire serve` with an engine that audits itself before it says anything of itself.

    python -m tests.helpers.checked_engine serve [the flags of `quire serve`]

Each snapshot, and so each scrape, comes after the full audit of blocks and requests, and must agree with it.
A failed audit is the engine's death, which a test sees.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from engine.client import ProcessClient
from engine.config import EngineOptions
from engine.types import EngineInfo, EngineSnapshot
from server import cli, serving
from tests.helpers.audit import check_core


class CheckedCore:
    """An EngineCore; only `snapshot` is different."""

    def __init__(self, core: Any, num_blocks: int) -> None:
        self._core = core
        self._num_blocks = num_blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def snapshot(self) -> EngineSnapshot:
        check_core(self._core)
        snapshot: EngineSnapshot = self._core.snapshot()
        pool = self._core.kv.pool
        states = [
            "in_use" if pool.ref(block_id) else "cached" if pool.is_kept(block_id) else "free"
            for block_id in range(1, self._num_blocks)
        ]
        counted = [states.count(state) for state in ("in_use", "cached", "free")]
        told = [snapshot.blocks_in_use, snapshot.blocks_cached, snapshot.blocks_free]
        assert told == counted and snapshot.blocks_total == sum(counted), (told, counted)
        shared = sum(pool.ref(block_id) > 1 for block_id in range(1, self._num_blocks))
        assert snapshot.blocks_shared == shared
        return snapshot


def build(options: EngineOptions, progress: Callable[[int, int], object]) -> tuple[CheckedCore, EngineInfo]:
    from engine.build import build as build_real  # torch, which the server process never imports

    core, info = build_real(options, progress)
    return CheckedCore(core, info.num_blocks), info


if __name__ == "__main__":
    serving.ProcessClient = functools.partial(  # type: ignore[misc, assignment]
        ProcessClient, factory="tests.helpers.checked_engine:build"
    )
    sys.exit(cli.main())
