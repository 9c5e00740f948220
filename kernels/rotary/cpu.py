"""The CPU backend of `rotary`."""

from .reference import rotary

__all__ = ["rotary"]
