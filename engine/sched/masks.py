"""Which tokens the requests under a grammar may draw next. Knows requests and matchers, not steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.grammar import Fill
from engine.plan import TokenMasks
from engine.request import Request


class Drawn(NamedTuple):
    """Masks, and the requests that need none any more.

    Attributes:
        complete: their grammar allows nothing but an end.
        stuck: it allows nothing at all, and why.
    """

    masks: TokenMasks | None
    complete: list[Request]
    stuck: list[tuple[Request, str]]


class Asked:
    """What the matchers of a step are asked. They answer while something else is done.

    Args:
        sampling: in the order in which the step samples; None for those whose token nobody waits for. None of
            these may take a token or end before the answer.
    """

    def __init__(self, sampling: Sequence[Request | None], fill: Fill) -> None:
        self._asking = [(i, r, r.matcher) for i, r in enumerate(sampling) if r is not None and r.matcher]
        matchers = [matcher for _, _, matcher in self._asking]
        self._words_KW = np.zeros((len(matchers), matchers[0].num_words if matchers else 0), dtype=np.uint32)
        self._problems = fill(matchers, self._words_KW) if matchers else list

    def answer(self) -> Drawn:
        """Waits for it."""
        kept: list[int] = []
        complete, stuck = [], []
        for k, (problem, (_, request, matcher)) in enumerate(
            zip(self._problems(), self._asking, strict=True)
        ):
            if problem is not None:
                stuck.append((request, problem))
            elif matcher.ended:
                complete.append(request)
            else:
                kept.append(k)
        words_KW = self._words_KW if len(kept) == len(self._asking) else self._words_KW[kept]
        indices = [self._asking[k][0] for k in kept]
        return Drawn(TokenMasks(indices, words_KW) if kept else None, complete, stuck)
