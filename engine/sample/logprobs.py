"""Log probabilities, launched with a step and read when it has arrived. It knows rows and logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.transfer import to_device, to_host
from engine.types import TokenLogprob
from kernels import api


class PendingLogprobs:
    """Log probabilities of drawn tokens and their alternatives on their way to the host.

    Args:
        wanted: per row, how many alternatives (0: only the token's own), or None for rows that did not ask.
        told: the rows that `found` tells of: all that asked, at least.
        found: of each of those its token, the token's log probability, and the likeliest ids and theirs.
    """

    def __init__(self, wanted: Sequence[int | None], told: Sequence[int], found: Sequence[Tensor]) -> None:
        self._wanted = wanted
        self._told = told
        self._host = [to_host(tensor) for tensor in found]

    @classmethod
    def launch(cls, logits_SV: Tensor, token_S: Tensor, wanted: Sequence[int | None]) -> PendingLogprobs:
        """Computes them for the rows that ask.

        Args:
            logits_SV: fp32, as the model gave them.
            token_S: the drawn tokens.
        """
        asking = [i for i, count in enumerate(wanted) if count is not None]
        if not asking:
            return cls(wanted, (), ())
        most = max(count for count in wanted if count is not None)
        index = to_device(asking, torch.int64, logits_SV.device)
        tokens = token_S[index]
        return cls(wanted, asking, (tokens, *api.logprobs(logits_SV[index], tokens.clamp(min=0), most)))

    def read(self) -> list[TokenLogprob | None]:
        """One entry per row, or an empty list when no row asked; the copies must have arrived."""
        if not self._host:
            return []
        tokens, chosen, ids, values = (tensor.tolist() for tensor in self._host)
        out: list[TokenLogprob | None] = [None] * len(self._wanted)
        for k, i in enumerate(self._told):
            count = self._wanted[i]
            if count is not None:
                top = tuple(zip(ids[k][:count], values[k][:count], strict=True))
                out[i] = TokenLogprob(tokens[k], chosen[k], top)
        return out
