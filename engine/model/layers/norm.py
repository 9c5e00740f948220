"""RMS normalisation with a weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels import api


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """`x / rms(x) * (weight + offset)` over the last dimension.

    Attributes:
        weight_E: or `[D]`, for the norms of queries and keys.
        offset: 1.0 where weights are stored around zero.
    """

    weight_E: Tensor
    eps: float
    offset: float

    def __call__(self, x_TE: Tensor, residual_TE: Tensor | None = None) -> Tensor:
        """The norm of x, or, with a residual, of `residual += x` (in place)."""
        return api.rms_norm(x_TE, self.weight_E, self.eps, offset=self.offset, residual_TE=residual_TE)
