"""The CPU backend of `paged_attention`."""

from .reference import paged_attention

__all__ = ["paged_attention"]
