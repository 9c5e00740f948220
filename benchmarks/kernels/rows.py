"""One line of the table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        rate: of the bytes that must move, or of the products, in `unit`.
        share: that, of the best that was calibrated.
        rivals: microseconds of others on the same shape, or why there are none.
    """

    op: str
    shape: str
    microseconds: float
    rate: float
    unit: str
    share: float
    rivals: dict[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        if math.isnan(self.microseconds):
            return f"{self.op:22} {self.shape:58} ran"
        beside = "".join(
            f"   {name} {took:.1f} us" if isinstance(took, float) else f"   {name}: {took}"
            for name, took in self.rivals.items()
        )
        return (
            f"{self.op:22} {self.shape:58} {self.microseconds:9.1f} us {self.rate:7.2f} {self.unit:8}"
            f"{self.share:6.0%}{beside}"
        )

    def plain(self) -> dict[str, Any]:
        return asdict(self)
