"""The CPU backend of `logprobs`."""

from .reference import logprobs

__all__ = ["logprobs"]
