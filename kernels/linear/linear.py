"""Linear layers over a weight packed once, at load time."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the order its backend likes, and its bias."""

    weight_OI: Tensor
    bias_O: Tensor | None


def pack_linear(weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
    """Packs a weight; the caller gives it up."""
    return PackedLinear(weight_OI, bias_O)


def linear(x_TI: Tensor, packed: PackedLinear) -> Tensor:
    """Returns `x @ weight.T + bias`."""
    return F.linear(x_TI, packed.weight_OI, packed.bias_O)
