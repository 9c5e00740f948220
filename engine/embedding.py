"""What an embedding is: the hidden states of a prompt, pooled into one vector of length 1.

Knows kinds, sizes and the bytes that vectors travel in; not how a model computes them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum, unique

from engine.errors import InvalidRequest

VALUE_BYTES = 4
VALUE_DTYPE = "<f4"  # as numpy calls it


@unique
class PoolingKind(StrEnum):
    """Of which tokens' hidden states the vector is made."""

    LAST = "last"
    MEAN = "mean"
    CLS = "cls"  # the first


@dataclass(frozen=True, slots=True)
class Pooling:
    """What to make of a prompt's hidden states.

    Attributes:
        dimensions: only the vector's first so many values, scaled to length 1 again; None: all.
    """

    kind: PoolingKind = PoolingKind.LAST
    dimensions: int | None = None

    @property
    def needs_every_token(self) -> bool:
        """The last token is always computed; others may be in the prefix cache, without hidden states."""
        return self.kind is not PoolingKind.LAST


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """What a model says of its embeddings.

    Attributes:
        size: values of a whole vector.
        kind: how the model was trained to pool.
        refusal: why it gives none; "" where it does.
        only: it gives nothing else, because its checkpoint has no output layer.
    """

    size: int = 0
    kind: PoolingKind = PoolingKind.LAST
    refusal: str = ""
    only: bool = False

    def check(self, pooling: Pooling | None) -> None:
        """Raises InvalidRequest where the model cannot do what is asked; None asks for text."""
        if pooling is None:
            if self.only:
                raise InvalidRequest(
                    "This model gives embeddings only: its checkpoint has no output layer (lm_head).", "model"
                )
            return
        if self.refusal:
            raise InvalidRequest(f"This model gives no embeddings. {self.refusal}", "model")
        if pooling.dimensions is not None and not 1 <= pooling.dimensions <= self.size:
            raise InvalidRequest(
                f"dimensions must be in [1, {self.size}] for this model, got {pooling.dimensions}.",
                "dimensions",
            )


DEFAULT_FACTS = EmbeddingFacts()


def values(embedding: bytes) -> tuple[float, ...]:
    """The numbers of a vector as it travels: fp32, little endian."""
    return struct.unpack(f"<{len(embedding) // VALUE_BYTES}f", embedding)
