"""Grammars are compiled here, on threads beside the one that owns the core: no step waits for them.

Knows how to have one compiled and whom to tell; not what a grammar is. How long one may take is bounded by
what compiles it, and how many are asked for at once by the clients.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.errors import QuireError
from engine.grammar import Grammar, Grammars

log = logging.getLogger(__name__)

# One that is hard does not keep the others waiting.
THREADS = 2
# How far behind the engine's steps its threads stand in line for a core, as `nice` counts.
NICENESS = 10

Done = Callable[[str | None], None]


class GrammarDesk:
    """Has grammars compiled.

    Args:
        grammars: compiles and keeps them; None where the core has none.
    """

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._threads = ThreadPoolExecutor(THREADS, "grammar", _yield_to_steps)

    def must_compile(self, grammar: Grammar | None) -> bool:
        """Whether to ask `compile` before a request with it is added. Without grammars the core refuses."""
        return grammar is not None and self._grammars is not None and not self._grammars.ready(grammar)

    def compile(self, grammar: Grammar, done: Done) -> None:
        """Calls `done` on some thread, with what is wrong with the grammar if anything is."""
        if self._grammars is None or self._grammars.ready(grammar):
            done(None)
        else:
            self._threads.submit(self._compile, self._grammars, grammar, done)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammars: Grammars, grammar: Grammar, done: Done) -> None:
        problem = None
        try:
            grammars.start(grammar)
        except QuireError as error:
            problem = str(error)
        except Exception:
            log.exception("a grammar could not be compiled")
            problem = "The engine could not compile this grammar."
        done(problem)


def _yield_to_steps() -> None:
    """Where cores are few, this thread gets one when no step wants it. On Linux threads have it each."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
