"""The CPU backend of `write_kv`."""

from .reference import write_kv

__all__ = ["write_kv"]
