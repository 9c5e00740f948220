"""The server's side of an engine process: tell it what to build, talk to it, end it.

Knows one child from start to end. Restarting and requests are the client's (engine.client). It lives on one
asyncio loop and is not thread-safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from typing import cast

from engine.process import frames
from engine.process.spawn import Child

log = logging.getLogger(__name__)

_POLL_S = 0.02
_LINGER_S = 2.0
_STACK_DUMP_S = 0.3

OnFrame = Callable[[frames.FromEngine], None]
OnLost = Callable[[str], None]


class EngineProcess(asyncio.Protocol):
    """One child process and the socket to it.

    Args:
        child: waits for its first frame.
        on_frame: called with each frame the child sends.
        on_lost: called once, when the socket closes or breaks, with what happened.
    """

    def __init__(self, child: Child, on_frame: OnFrame, on_lost: OnLost) -> None:
        self._child = child
        self._on_frame = on_frame
        self._on_lost: OnLost | None = on_lost
        self._splitter: frames.Splitter[frames.FromEngine] = frames.Splitter(frames.from_engine)
        self._transport: asyncio.Transport | None = None

    @property
    def pid(self) -> int:
        return self._child.process.pid

    async def start(self, start: frames.Start) -> None:
        """Tells the child what to build; Ready or Failed arrive as frames."""
        self._child.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: self, sock=self._child.socket)
        except BaseException:
            self._child.drop()
            raise
        self.send(start)

    def send(self, frame: frames.ToEngine) -> None:
        """Sends at once, or buffers; to a child that is gone, does nothing."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frames.pack(frame))

    async def end(self, patience_s: float) -> None:
        """Asks the child to end, then kills it. It ignores SIGTERM: see engine.process.child."""
        self._on_lost = None
        self.send(frames.Shutdown())
        if not await self._exits_within(patience_s):
            log.warning("the engine did not end when asked; killing it")
            self.kill()
            await self._exits_within(patience_s + 5.0)
        self._close()

    def kill(self) -> None:
        self._child.kill()

    async def kill_with_stacks(self) -> None:
        """Kills a child that hangs, after asking where: it writes its stacks to stderr if it still can."""
        if self._child.is_alive:
            with contextlib.suppress(ProcessLookupError):
                self._child.process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(_STACK_DUMP_S)
        self.kill()
        await self._exits_within(5.0)
        self._close()

    async def exit_status(self) -> str:
        """How the child ended, for people; kills it if it lingers."""
        if not await self._exits_within(_LINGER_S):
            self.kill()
            await self._exits_within(5.0)
        self._close()
        code = self._child.process.returncode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    async def _exits_within(self, patience_s: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while self._child.is_alive:
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _close(self) -> None:
        self._on_lost = None
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        try:
            received = self._splitter.feed(data)
        except frames.FrameError as error:
            self._lose(f"the engine sent a malformed frame ({error})")
            return
        for frame in received:
            self._on_frame(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("the engine process closed its connection")

    def _lose(self, reason: str) -> None:
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost(reason)
        if self._transport is not None:
            self._transport.abort()
