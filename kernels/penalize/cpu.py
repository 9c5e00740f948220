"""The CPU backend of `penalize`."""

from .reference import penalize

__all__ = ["penalize"]
