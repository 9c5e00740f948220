"""The CPU backend of `copy_blocks`."""

from .reference import copy_blocks

__all__ = ["copy_blocks"]
