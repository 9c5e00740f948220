"""The CPU backend of `sample`."""

from .reference import sample

__all__ = ["sample"]
