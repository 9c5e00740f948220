"""Device time of calls, and what the device can do at best. Knows no kernel of ours.

A figure is the device time of one call: calls over several layers' memory, more than the L2 cache holds
together, are captured in one CUDA graph and its replays timed with events. So neither the host's launch time
nor a warm cache is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
# Rotating memory: several times the 50 to 60 MB of L2 of an H100 or H200.
ROTATE_BYTES = 512 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Lab:
    """Where and how to measure.

    Attributes:
        dry: run everything once, tiny, in Triton's interpreter on the CPU, and report no figures.
        fa3: a file with FlashAttention 3 as vLLM builds it; empty where there is none.
    """

    dry: bool
    fa3: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_()

    def layers_for(self, bytes_per_layer: int) -> int:
        """How many layers' memory the L2 cache does not hold."""
        return 1 if self.dry else max(2, min(16, ROTATE_BYTES // max(bytes_per_layer, 1) + 1))

    def fits(self, wanted_bytes: int) -> bool:
        """Whether there is memory for it, with room for what is measured beside it."""
        return self.dry or wanted_bytes < 0.4 * torch.cuda.mem_get_info()[0]

    def time_us(self, calls: Sequence[Call], before: Call = lambda: None, repeats: int = 10) -> float:
        """Mean device time of one of the calls, which run in turn.

        Args:
            before: runs on the host before each pass over the calls, the captured one included.
        """
        if self.dry:
            before()
            for call in calls:
                call()
            return float("nan")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            before()
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        before()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (repeats * len(calls))


class Deadline:
    """So many seconds for a part."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def passed(self) -> bool:
        return time.monotonic() > self._end


@dataclass(frozen=True)
class Best:
    """What the device does at best: the rates that shares are of.

    Attributes:
        copy_bytes_per_s: read and written together.
        matmul_flops: of large bf16 products.
        graph_launch_us: host time of launching an empty graph, until the next one can be launched.
    """

    copy_bytes_per_s: float
    matmul_flops: float
    graph_launch_us: float


def calibrate(lab: Lab) -> Best:
    """Copy bandwidth, matmul rate and the cost of a graph launch, here and now."""
    size = 1024 if lab.dry else GIB
    source, target = (torch.empty(size, dtype=torch.uint8, device=lab.device) for _ in range(2))
    copied = lab.time_us([lambda: target.copy_(source)] * 4)
    side = 16 if lab.dry else 8192
    a, b = lab.random(side, side), lab.random(side, side)
    multiplied = lab.time_us([lambda: a @ b] * 4)
    return Best(2 * size / copied * 1e6, 2 * side**3 / multiplied * 1e6, _graph_launch_us(lab))


def _graph_launch_us(lab: Lab, launches: int = 1000) -> float:
    if lab.dry:
        return float("nan")
    word = torch.zeros(1, device=lab.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        word.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(launches):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / launches * 1e6
