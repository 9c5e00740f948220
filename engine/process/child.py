"""The engine process: builds an engine, runs it, and reports over one socket until that closes.

    main thread    owns the core: engine.process.loop
    reader         frames from the server -> the loop's queue; the end of the stream ends the process
    heartbeat      tells the server how far the loop is, also while a step runs

It outlives neither its server nor its own errors: both end it within seconds, whatever the main thread does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from engine import logs
from engine.config import EngineOptions
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.logs import LogOptions
from engine.process import frames
from engine.process.loop import EngineLoop
from engine.types import EngineInfo

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 0.25
PROGRESS_INTERVAL_S = 0.1
# How long a step may go on after the server is gone.
GRACE_S = 2.0
_RECEIVE_BYTES = 1 << 18
_META_KERNELS = "torch._meta_registrations"

Build = Callable[[EngineOptions, Callable[[int, int], None]], tuple[EngineCore, EngineInfo]]


def main(descriptor: int, module: str) -> int:
    """Runs the engine process on an inherited socket; returns the exit code.

    Args:
        module: the factory's, imported while the server is not yet ready to say what to build.
    """
    _prepare_process()
    with contextlib.suppress(ImportError):  # will be met again, where somebody can be told
        importlib.import_module(module)
    link = Link(socket.socket(fileno=descriptor))
    try:
        return _serve(link)
    except ConnectionError:
        return 0  # the server is gone; so are we
    except Exception as error:
        if not isinstance(error, ConfigError):
            log.exception("the engine failed")
        with contextlib.suppress(OSError):
            link.send(frames.Failed(type(error).__name__, _message(error)))
        return 1


def _prepare_process() -> None:
    """Ctrl-C and a service manager's SIGTERM reach the whole group, but the server decides when to drain and
    end: it closes the socket, and may always kill. SIGUSR1 writes every thread's stack to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Torch keeps a compiled oneDNN primitive for every batch size it has seen, up to a megabyte each, for as
    # long as the process lives. The variables are read when torch is imported, which is later.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "16")
    # A quarter of importing torch is for tensors without data, which compilers use and nothing here does.
    sys.modules.setdefault(_META_KERNELS, ModuleType(_META_KERNELS))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logs.configure(LogOptions())


def _serve(link: Link) -> int:
    start = link.receive_start()
    if start is None:
        return 0
    logs.configure(start.log)
    reader = Reader(link)
    threading.Thread(target=_beat, args=(link, reader), name="heartbeat", daemon=True).start()
    threading.Thread(target=reader.run, name="reader", daemon=True).start()
    core, info = _factory(start.factory)(start.options, link.report_progress)
    loop = EngineLoop(core, link.send)
    reader.attach(loop)
    link.send(frames.Outputs([], core.snapshot()))  # so that nobody ever sees a pool of no blocks
    # What is there now stays: without it a full collection, which stops every stream, takes no 0.08 s.
    gc.collect()
    gc.freeze()
    # And what comes and stays is mostly published blocks, in no cycles: a look at 40,000 takes 10 ms.
    gc.set_threshold(700, 10, 1000)
    link.send(frames.Ready(info))
    loop.run()
    return 0


def _factory(name: str) -> Build:
    module, _, function = name.partition(":")
    try:
        build: Build = getattr(importlib.import_module(module), function)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "kernels":
            raise ConfigError(
                "Another Python package named `kernels` hides Quire's own. Remove it "
                "(pip uninstall kernels), or run Quire in an environment of its own."
            ) from error
        raise
    return build


def _message(error: Exception) -> str:
    """A ConfigError speaks to the operator; of anything else only the kind is fit to be shown."""
    return str(error) if isinstance(error, ConfigError) else "see the engine's log"


class Link:
    """The child's end of the socket. `send` may be called from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._progress_s = 0.0
        self._splitter: frames.Splitter[Any] = frames.Splitter(frames.to_engine)
        self.early: list[Any] = []

    def send(self, frame: frames.FromEngine) -> None:
        data = frames.pack(frame)
        with self._lock:
            self._socket.sendall(data)

    def report_progress(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if done_bytes >= total_bytes or now - self._progress_s >= PROGRESS_INTERVAL_S:
            self._progress_s = now
            self.send(frames.Progress(done_bytes, total_bytes))

    def receive(self) -> list[Any] | None:
        """Waits for frames; None at the end of the stream."""
        data = self._socket.recv(_RECEIVE_BYTES)
        return self._splitter.feed(data) if data else None

    def receive_start(self) -> frames.Start | None:
        """The first frame says what to build. None if the server went away before it did."""
        while (received := self.receive()) is not None:
            if received:
                start, *self.early = received
                if not isinstance(start, frames.Start):
                    raise frames.FrameError("the first frame is not Start")
                return start
        return None


class Reader:
    """Hands the server's frames to the loop. Those that come before there is one wait."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.loop: EngineLoop | None = None
        self._waiting = list(link.early)
        self._lock = threading.Lock()

    def attach(self, loop: EngineLoop) -> None:
        with self._lock:
            self.loop = loop
            for frame in self._waiting:
                loop.put(frame)

    def run(self) -> None:
        try:
            while (received := self._link.receive()) is not None:
                for frame in received:
                    self._take(frame)
        except (OSError, frames.FrameError):
            log.exception("the connection to the server broke")
        self._end()

    def _take(self, frame: Any) -> None:
        with self._lock:
            if self.loop is None:
                self._waiting.append(frame)
            else:
                self.loop.put(frame)

    def _end(self) -> None:
        """Asks the loop to end and ends the process if it does not: it may be loading, or stuck."""
        self._take(frames.Shutdown())
        time.sleep(GRACE_S)
        os._exit(1)


def _beat(link: Link, reader: Reader) -> None:
    """Says at fixed intervals how long the present step has been running, also before there is a loop."""
    with contextlib.suppress(OSError):
        while True:
            since = 0.0 if reader.loop is None else reader.loop.busy_since
            link.send(frames.Heartbeat(time.monotonic() - since if since else 0.0))
            time.sleep(HEARTBEAT_INTERVAL_S)
