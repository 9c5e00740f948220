"""Somebody who watches the pool: what PoolFrames add up to."""

from __future__ import annotations

from array import array

from engine.kv.block_pool import BlockPool
from engine.views import PoolFrame

COLUMNS = ("refs", "owners", "tenants", "positions", "parents", "taken_ds", "idle_ds")


def numbers(data: bytes) -> list[int]:
    return array("I", data).tolist()


class Viewer:
    """Applies frames as the live page does.

    Attributes:
        rows: by column, one value for each block, the padding block included.
        last: the frame applied last.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}
        self.last: PoolFrame | None = None

    def apply(self, frame: PoolFrame) -> None:
        assert frame.full or self.last is not None, "the first frame must be a full one"
        assert frame.full or self.last is None or frame.sequence == self.last.sequence + 1, "a frame is lost"
        columns = {name: numbers(getattr(frame, name)) for name in COLUMNS} | {"kept": list(frame.kept)}
        if frame.full:
            assert frame.ids == b""
            self.rows = columns
        else:
            ids = numbers(frame.ids)
            assert all(len(column) == len(ids) for column in columns.values())
            for name, column in columns.items():
                for block_id, value in zip(ids, column, strict=True):
                    self.rows[name][block_id] = value
        self.last = frame

    def expect(self, pool: BlockPool) -> None:
        """Raises AssertionError where it differs from what the pool is."""
        facts = pool.facts
        true = {name: getattr(facts, name).tolist() for name in COLUMNS} | {"kept": list(facts.kept)}
        assert self.rows == true
        ids = range(pool.num_blocks + 1)
        refs, kept = self.rows["refs"], self.rows["kept"]
        assert refs == [pool.ref(block_id) for block_id in ids]
        assert sum(ref > 0 for ref in refs) == pool.num_in_use
        assert sum(ref > 1 for ref in refs) == pool.num_shared
        assert sum(not ref and is_kept for ref, is_kept in zip(refs, kept, strict=True)) == pool.num_idle
