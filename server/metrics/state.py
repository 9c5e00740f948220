"""What one scrape sees: everything that moves is read once, so that its parts belong together.

Knows the engine's client and /proc; does not know metric names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.client import EngineClient
from engine.types import EngineInfo, EngineSnapshot
from engine.views import TenantUse

NOTHING = EngineSnapshot()


@dataclass(frozen=True, slots=True)
class State:
    """The engine at one moment.

    Attributes:
        info: None until the first engine serves.
        up: it lives and makes progress.
        pid: None where it has no process of its own.
    """

    snapshot: EngineSnapshot = NOTHING
    info: EngineInfo | None = None
    up: bool = False
    restarts: int = 0
    pid: int | None = None


def read(client: EngineClient) -> State:
    """What a started engine last said of itself."""
    up = client.health() is None
    snapshot = client.snapshot()
    return State(
        snapshot=snapshot if up else emptied(snapshot),
        info=client.info,
        up=up,
        # Only a client that watches a process knows these.
        restarts=getattr(client, "restarts", 0),
        pid=getattr(client, "engine_pid", None),
    )


def emptied(snapshot: EngineSnapshot) -> EngineSnapshot:
    """What a dead engine's last words mean now: its counts stand, and it holds nothing any more."""
    return replace(
        snapshot,
        running=0,
        waiting=0,
        blocks_in_use=0,
        blocks_shared=0,
        blocks_cached=0,
        blocks_free=snapshot.blocks_total,
        tokens_held=0,
        cached_tokens=0,
        ghosts=0,
        tenants={
            name: replace(use, blocks_in_use=0, blocks_cached=0, running=0, waiting=0)
            for name, use in snapshot.tenants.items()
        },
    )


def tenant_uses(snapshot: EngineSnapshot, names: tuple[str, ...]) -> Mapping[str, TenantUse]:
    """By name: those configured, whether they came yet or not, and those the engine knows."""
    return {name: TenantUse() for name in names} | dict(snapshot.tenants)


def resident_bytes(pid: int) -> int | None:
    """Memory of a process that is in RAM; None where there is no such process, or no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
