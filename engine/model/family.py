"""What a model family is: how to read its config, and what its weights are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.model.arch import ArchSpec
from engine.model.hf_config import HFConfig
from engine.model.weights import WeightNames


@dataclass(frozen=True, slots=True)
class Family:
    """One way to write a decoder down.

    Attributes:
        read: the whole config.json -> the decoder it describes. Raises ModelError.
        names: of the weights on disk.
    """

    read: Callable[[HFConfig], ArchSpec]
    names: WeightNames = field(default_factory=WeightNames)
