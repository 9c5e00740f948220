"""Which tokens the requests under a grammar may draw next. Knows requests and matchers, not steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.grammar import Grammars
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


def draw_masks(sampling: Sequence[Request | None], grammars: Grammars) -> Drawn:
    """Asks the matchers of a step.

    Args:
        sampling: in the order in which the step samples; None for those whose token nobody waits for.
    """
    asking = [(i, r, r.matcher) for i, r in enumerate(sampling) if r is not None and r.matcher is not None]
    if not asking:
        return Drawn(None, [], [])
    matchers = [matcher for _, _, matcher in asking]
    words_KW = np.zeros((len(matchers), matchers[0].num_words), dtype=np.uint32)
    problems = grammars.fill(matchers, words_KW)
    index_K = np.array([i for i, _, _ in asking], dtype=np.int64)
    kept = [k for k, matcher in enumerate(matchers) if problems[k] is None and not matcher.ended]
    if len(kept) == len(asking):
        return Drawn(TokenMasks(index_K, words_KW), [], [])
    complete, stuck = [], []
    for problem, (_, request, matcher) in zip(problems, asking, strict=True):
        if problem is not None:
            stuck.append((request, problem))
        elif matcher.ended:
            complete.append(request)
    return Drawn(TokenMasks(index_K[kept], words_KW[kept]) if kept else None, complete, stuck)
