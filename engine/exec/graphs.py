"""CUDA graphs of decode steps: captured when there is time, launched when a step needs one.

The server answers from its first moment on, step by step. Graphs are captured meanwhile: those that steps
needed and did not find before the others, the largest batches first. While requests run, capturing gets a
tenth of the time at most; while none do, all of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import torch

from engine.exec.decode import Work

log = logging.getLogger(__name__)

# Time that must pass between two captures while requests run, as a multiple of what the first one took.
_PAUSE = 9.0


class Graph(Protocol):
    """Launches that were recorded."""

    def replay(self) -> None:
        """Launches them all, on the same memory."""
        ...


class GraphMaker(Protocol):
    """Records launches. All its graphs share one pool of memory, for they never run side by side."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        """Records what `launch` launches, after one run to warm up."""
        ...


class CudaGraphs:
    """The GraphMaker of a CUDA device."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, launch: Callable[[], None]) -> Graph:
        """The warm-up compiles kernels and loads modules, neither of which a capture may do."""
        launch()
        graph = torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            # Other threads may use CUDA meanwhile; torch.cuda.graph would wait for the device and its caches.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        now.wait_stream(self._stream)
        return graph


def padded_sizes(most: int) -> list[int]:
    """Sizes of batches with a graph of their own: 1, 2, 4, 8, 16, 24 ... 256, 288 ... up to `most`."""
    sizes = [1, 2, 4, *range(8, min(most, 256), 8), *range(256, most, 32)]
    return [size for size in sizes if size < most] + [most]


class GraphShelf:
    """The graphs that are there, and those that should be.

    Args:
        maker: captures them.
        pad: makes sure that a work finds padding alone: what is launched to be recorded touches nobody.
        launch: launches it.
        works: what to capture though no step has asked for it, the last one first.
    """

    def __init__(
        self,
        maker: GraphMaker,
        pad: Callable[[Work], None],
        launch: Callable[[Work], None],
        works: list[Work],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._maker = maker
        self._pad = pad
        self._launch = launch
        self._clock = clock
        self._graphs: dict[Work, Graph] = {}
        self._missing = dict.fromkeys(works)  # a set that keeps its order; the last is captured next
        self._not_before_s = 0.0
        self._broken = False

    def find(self, work: Work) -> Graph | None:
        """The graph; where there is none yet, it will be the next."""
        graph = self._graphs.get(work)
        if graph is None and not self._broken:
            self._missing.pop(work, None)
            self._missing[work] = None
        return graph

    def capture_if_due(self) -> bool:
        """Captures one graph if that does not take much from the steps. Whether it did."""
        return self._clock() >= self._not_before_s and self.capture_next()

    def capture_next(self) -> bool:
        """Captures the graph that is wanted most. Whether there was one."""
        if not self._missing:
            return False
        work, _ = self._missing.popitem()
        began_s = self._clock()
        try:
            self._pad(work)
            self._graphs[work] = self._maker.capture(lambda: self._launch(work))
        except Exception:  # of the device, its memory, a compiler: no request is to suffer
            log.exception("no graph for %s: steps without a graph run launch by launch from now on", work)
            self._broken = True
            self._missing.clear()
            return True
        took_s = self._clock() - began_s
        self._not_before_s = began_s + (1 + _PAUSE) * took_s
        log.info(
            "captured a graph: %s, in %.0f ms (%d so far, %d to come)",
            work, took_s * 1e3, len(self._graphs), len(self._missing),
        )  # fmt: skip
        return True
