"""A server's life: start the engine, serve, drain, stop.

Knows signals, sockets and phases; does not know HTTP messages. uvicorn listens and talks; when to end is
decided here, because uvicorn on its own closes the listening socket first (probes then see a dead server
instead of "not ready") and has no place to refuse new requests while old ones finish.

    SIGTERM, SIGINT   1st: /ready 503, new requests 503, running ones finish or hit the timeout, exit 0
                      2nd: everything ends at once, exit 128 + signal
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from server import engine_line
from server.http_protocol import limited_protocol
from server.service import Phase, Service
from server.settings import ServerSettings

logger = logging.getLogger("quire")

# After the engine stopped, for replies to be written; then tasks are cancelled.
LAST_WORDS_S = 1.5
BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn with our own end. Made inside the event loop that runs it."""

    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol(settings),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, round(settings.keep_alive_s)),
                timeout_graceful_shutdown=1,
                backlog=BACKLOG,
            )
        )
        self.settings = settings
        self.service: Service = app.state.service
        self.stop_signal: int | None = None
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def run_until_stopped(self, sock: socket.socket, on_ready: Callable[[], None]) -> int:
        """Serves until a signal or a failed start; returns the exit code.

        Args:
            sock: from `listen`; closed at the end.
            on_ready: called once, when the engine serves.

        Raises:
            BaseException: what kept the engine from starting.
        """
        sock.listen(BACKLOG)
        serving = asyncio.create_task(self.serve([sock]))
        watching: asyncio.Task[None] | None = None
        try:
            await _first(self.service.started.wait(), self._stop.wait(), or_task=serving)
            if self.service.phase is Phase.READY:
                # What is there now stays: without it a full collection, which stops every stream, takes no
                # 0.04 s.
                gc.collect()
                gc.freeze()
                on_ready()
                watching = asyncio.create_task(engine_line.watch(self.service.client), name="engine-line")
                await _first(self._stop.wait(), or_task=serving)
                await self._drain()
        finally:
            if watching is not None:
                watching.cancel()
            self.should_exit = True
            await serving
        if self.service.failure is not None and self.stop_signal is None:
            raise self.service.failure
        return 128 + (self.stop_signal or signal.SIGTERM) if self._stop_now.is_set() else 0

    def request_stop(self, number: int = signal.SIGTERM) -> None:
        """What a signal does: the first asks politely, the second does not."""
        if self._stop.is_set():
            self._stop_now.set()
        self.stop_signal = number
        self._stop.set()

    async def _drain(self) -> None:
        """Refuses what is new, waits for what runs; past the timeout, ends it with an error."""
        self.service.drain()
        active = self.service.metrics.active_requests
        if active:
            logger.info(
                "Draining: %d requests are running, new ones get 503. Signal again to stop now.", active
            )
        await _first(self._idle(), self._stop_now.wait(), timeout_s=self.settings.shutdown_timeout_s)
        if self.service.metrics.active_requests:
            logger.warning("Ending %d requests that are still running.", self.service.metrics.active_requests)
            await _first(self.service.client.stop(), timeout_s=LAST_WORDS_S)
            await _first(self._idle(), timeout_s=LAST_WORDS_S)

    async def _idle(self) -> None:
        """Until every reply is written and the engine has nothing left."""
        while self.service.metrics.active_requests:
            await asyncio.sleep(0.01)
        await self.service.client.drained()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's: ours only set flags, and are not raised again at the end."""
        loop = asyncio.get_running_loop()
        installed = []
        for number in (signal.SIGINT, signal.SIGTERM):
            # Only the main thread may; elsewhere `request_stop` remains.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, self.request_stop, number)
                installed.append(number)
        try:
            yield
        finally:
            for number in installed:
                loop.remove_signal_handler(number)


async def _first(
    *waits: Coroutine[Any, Any, Any],
    or_task: asyncio.Task[None] | None = None,
    timeout_s: float | None = None,
) -> None:
    """Until one of them is done; the others are cancelled, except for `or_task`."""
    tasks = {asyncio.ensure_future(wait) for wait in waits}
    try:
        watched = tasks if or_task is None else tasks | {or_task}
        await asyncio.wait(watched, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
