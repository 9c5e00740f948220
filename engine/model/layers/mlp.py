"""The gated MLP: `down(act(gate(x)) * up(x))`, gate and up in one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.model.arch import Activation
from kernels import api


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """One layer's MLP.

    Attributes:
        gate_up: `[2F, E]`, gate rows first.
        down: `[E, F]`.
    """

    gate_up: api.PackedLinear
    down: api.PackedLinear
    activation: Activation

    def __call__(self, x_TE: Tensor) -> Tensor:
        gate_up_T2F = api.linear(x_TE, self.gate_up)
        hidden_TF = api.silu_mul(gate_up_T2F, activation=self.activation)
        return api.linear(hidden_TF, self.down)
