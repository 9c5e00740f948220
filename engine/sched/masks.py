"""Which tokens the requests under a grammar may draw next. Knows requests and matchers, not steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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


def draw_masks(sampling: Sequence[Request | None]) -> Drawn:
    """Asks the matchers, which is what takes time.

    Args:
        sampling: in the order in which the step samples; None for those whose token nobody waits for.
    """
    asking = [(i, r, r.matcher) for i, r in enumerate(sampling) if r is not None and r.matcher is not None]
    if not asking:
        return Drawn(None, [], [])
    words_KW = np.zeros((len(asking), asking[0][2].num_words), dtype=np.uint32)
    indices: list[int] = []
    complete, stuck = [], []
    for index, request, matcher in asking:
        problem = matcher.fill(words_KW[len(indices)])
        if problem is not None:
            stuck.append((request, problem))
        elif matcher.ended:
            complete.append(request)
        else:
            indices.append(index)
    return Drawn(TokenMasks(indices, words_KW[: len(indices)]) if indices else None, complete, stuck)
