"""What is left to do for a request that has left: it knows how far that got, and does none of it.

0              published                full                    len(block_ids)
|------------------|----------------------|----------------------------|
 found by others    confirmed: published   never confirmed
                    before all is dropped
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import Request


@dataclass(slots=True)
class Leaving:
    """A request's page table after it gave that up.

    Attributes:
        request: whose tokens the blocks hold; it may be running again, with another page table.
        block_ids: those it still holds a reference on.
    """

    request: Request
    block_ids: list[int]
    published: int
    full: int

    @property
    def work(self) -> int:
        """Blocks to publish, or, where that is done, to give back."""
        return self.full - self.published or len(self.block_ids)

    def publish_next(self, most: int) -> tuple[int, int] | None:
        """The next stretch of blocks to publish, which from now on counts as done; None: nothing is left."""
        if self.published == self.full:
            return None
        first, self.published = self.published, min(self.published + most, self.full)
        return first, self.published

    def drop_next(self, most: int) -> list[int]:
        """The next blocks to give back: the tail first, so that the head of a chain is evicted last."""
        dropped = self.block_ids[: -most - 1 : -1]
        del self.block_ids[-most:]
        return dropped
