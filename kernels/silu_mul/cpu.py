"""The CPU backend of `silu_mul`."""

from .reference import silu_mul

__all__ = ["silu_mul"]
