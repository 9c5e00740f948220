"""Compiles the GPU kernels of a step before the step is run: all at once, on threads.

Triton compiles a kernel where it is first launched, and what comes after it waits. In a rehearsal launches
are left out, so that to run a step is only to say which kernels it has. Threads compile those:

    rehearsed    kernel, kernel, kernel ...
    threads              compile ----->
                           compile ---------->
    run                launch ........ launch .... launch       each waits for its own kernel alone

It knows Triton; not which kernels there are. Most of a compilation does not hold Python's lock. Triton before
3.7 forgets what is still being compiled: who launches that compiles it once more, and finds the rest on disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


@contextlib.contextmanager
def rehearsal(threads: int) -> Iterator[None]:
    """Within, a kernel that would be launched is compiled instead. The end does not wait for it.

    Results are whatever was in their memory: nobody may look at them, or use them to find other memory. No
    other thread may launch kernels meanwhile.
    """
    import triton
    from triton.runtime.jit import JITFunction

    stock_run = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return stock_run(self, *args, warmup=True, **kwargs)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="compiler")
    mode = triton.AsyncCompileMode(pool)
    JITFunction.run = run
    try:
        with mode:
            yield
            mode.raw_futures.clear()  # else the mode would wait for them here
    finally:
        JITFunction.run = stock_run
        pool.shutdown(wait=False)
