"""The processes that share one model, as the model sees them.

With one process every operation is its own input, so the model is written once. It does not know how
processes are started, nor what a request is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensor parallelism over `size` processes. Only size 1 exists so far.

    Raises:
        ConfigError: another size was asked for.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if (self.rank, self.size) != (0, 1):
            raise ConfigError(f"Tensor parallelism over {self.size} processes is not available; use 1.")

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of everyone's `x`; follows each linear that is split by its inputs."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Everyone's `x` joined along the last dimension; follows a linear split by its outputs."""
        return x
