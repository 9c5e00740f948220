"""An engine in a process of its own: watched, and replaced when it dies.

    STARTING --Ready--> SERVING --dies or hangs--> DEAD --new process, Ready--> SERVING
        |                                            |
        '- cannot start: ConfigError                 '- too many deaths: stays DEAD

While it is dead, requests in flight have got EngineDead, new ones get it at once, and `health` says why. The
API process never ends because its engine did.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from engine import errors
from engine.client.base import STOPPED, EngineClient
from engine.config import EngineOptions
from engine.errors import ConfigError
from engine.logs import LogOptions
from engine.process import frames
from engine.process.launcher import EngineProcess
from engine.process.spawn import DEFAULT_FACTORY, Child
from engine.text.tokenizer import Tokenizer
from engine.types import EngineInfo

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0
OnProgress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Supervision:
    """How long is too long, and how often is too often.

    Attributes:
        step_timeout_s: a step that runs longer is hung.
        heartbeat_timeout_s: silence of a process that should say something four times a second.
        restarts, restart_window_s: after so many deaths in so long it stays dead.
        backoff_s: the pause before the second restart; doubles from there. The first has none.
        stop_patience_s: between being asked to end and being killed.
    """

    start_timeout_s: float = 1800.0
    step_timeout_s: float = 120.0
    heartbeat_timeout_s: float = 30.0
    restarts: int = 5
    restart_window_s: float = 600.0
    backoff_s: float = 1.0
    stop_patience_s: float = 3.0

    @property
    def watch_interval_s(self) -> float:
        return min(0.5, self.step_timeout_s / 20, self.heartbeat_timeout_s / 20)


class ProcessClient(EngineClient):
    """An EngineClient whose engine may die.

    Args:
        tokenizer: for the text of events.
        on_progress: called with (bytes loaded, bytes in all) while an engine starts.
        factory: "module:function" that builds core and info, called in the engine process.
        log_options: of the engine process.
        child: a process of this factory that was spawned already, for the first start.
    """

    def __init__(
        self,
        options: EngineOptions,
        tokenizer: Tokenizer,
        *,
        on_progress: OnProgress | None = None,
        factory: str = DEFAULT_FACTORY,
        supervision: Supervision | None = None,
        log_options: LogOptions | None = None,
        child: Child | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self._start_frame = frames.Start(options, factory, log_options or LogOptions())
        self._on_progress = on_progress
        self._child = child
        self._limits = supervision or Supervision()
        self._process: EngineProcess | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._heard_s = self._busy_s = 0.0
        self._deaths: deque[float] = deque(maxlen=self._limits.restarts)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    @property
    def engine_pid(self) -> int | None:
        """The engine process's, for operators and tests."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> EngineInfo:
        info = await self._launch()
        self._spawn(self._watch())
        return info

    async def _launch(self) -> EngineInfo:
        """Starts a process and waits until it serves.

        Raises:
            ConfigError: it said why it cannot, or ended without a word.
        """
        ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._ready = ready
        child, self._child = self._child or Child(self._start_frame.factory), None
        self._process = process = EngineProcess(child, self._on_frame, self._on_lost)
        try:
            await process.start(self._start_frame)
            async with asyncio.timeout(self._limits.start_timeout_s):
                info = await ready
        except _LostWhileStarting as lost:
            how = await process.exit_status()
            raise ConfigError(f"The engine process ended while it started ({how}); see the log.") from lost
        except TimeoutError:
            await process.kill_with_stacks()
            raise ConfigError(
                f"The engine did not start within {self._limits.start_timeout_s:g} s."
            ) from None
        except BaseException:
            process.kill()
            await process.end(self._limits.stop_patience_s)
            raise
        self._info, self._why_dead = info, None
        self._heard_s, self._busy_s = time.monotonic(), 0.0
        return info

    def _on_frame(self, frame: frames.FromEngine) -> None:
        if isinstance(frame, frames.Outputs | frames.Answer | frames.Pool):
            self._receive(frame)
        elif isinstance(frame, frames.Heartbeat):
            self._heard_s, self._busy_s = time.monotonic(), frame.busy_s
        elif isinstance(frame, frames.Progress):
            if self._on_progress is not None:
                self._on_progress(frame.done_bytes, frame.total_bytes)
        elif isinstance(frame, frames.Ready):
            self._settle(frame.info)
        else:
            self._failed(frame)

    def _settle(self, result: EngineInfo | Exception) -> bool:
        """Ends the wait for Ready, if somebody waits."""
        if self._ready is None or self._ready.done():
            return False
        if isinstance(result, Exception):
            self._ready.set_exception(result)
        else:
            self._ready.set_result(result)
        return True

    def _failed(self, frame: frames.Failed) -> None:
        kind = getattr(errors, frame.kind, None)
        if isinstance(kind, type) and issubclass(kind, ConfigError):
            error = kind(frame.message)
        else:
            error = ConfigError(f"The engine could not start ({frame.kind}: {frame.message}).")
        if not self._settle(error):
            self._die(f"it failed ({frame.kind})")

    def _on_lost(self, reason: str) -> None:
        if not self._settle(_LostWhileStarting(reason)):
            self._die(reason)

    def _die(self, reason: str, *, hung: bool = False) -> None:
        """From here on requests are refused; a new engine is on its way."""
        if self._why_dead is not None or self._process is None:
            return
        log.error("the engine died: %s", reason)
        self._why_dead = f"The engine died: {reason}. A new one is starting."
        self._table.fail_all("The engine died while it worked on this request.")
        self._desk.fail_all("The engine died before it answered.")
        self._spawn(self._replace(self._process, hung))

    async def _replace(self, dead: EngineProcess, hung: bool) -> None:
        if hung:
            await dead.kill_with_stacks()
        log.error("the engine process ended: %s", await dead.exit_status())
        while (delay_s := self._delay_s()) is not None:
            await asyncio.sleep(delay_s)
            try:
                await self._launch()
            except ConfigError as error:
                log.error("the engine did not start again: %s", error)
                continue
            self.restarts += 1
            log.warning("a new engine serves (restart %d)", self.restarts)
            return
        self._why_dead = (
            f"The engine died {self._limits.restarts + 1} times in {self._limits.restart_window_s:g} s "
            "and is not started again."
        )
        log.error(self._why_dead)

    def _delay_s(self) -> float | None:
        """How long to wait before the next start; None to give up."""
        now = time.monotonic()
        while self._deaths and now - self._deaths[0] > self._limits.restart_window_s:
            self._deaths.popleft()
        before = len(self._deaths)
        if before >= self._limits.restarts:
            return None
        self._deaths.append(now)
        return min(self._limits.backoff_s * 2.0 ** (before - 1), MAX_BACKOFF_S) if before else 0.0

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._limits.watch_interval_s)
            if self._hang() is not None:
                # If it was this loop that hung, what the engine said meanwhile is read before we look again.
                await asyncio.sleep(0.05)
                if (reason := self._hang()) is not None:
                    self._die(reason, hung=True)

    def _hang(self) -> str | None:
        if self._why_dead is not None:
            return None
        silent_s = time.monotonic() - self._heard_s
        if silent_s > self._limits.heartbeat_timeout_s:
            return f"no sign of life for {self._limits.heartbeat_timeout_s:g} s"
        if self._busy_s and self._busy_s + silent_s > self._limits.step_timeout_s:
            return f"a step took more than {self._limits.step_timeout_s:g} s"
        return None

    def _send(self, frame: frames.ToEngine) -> None:
        if self._process is not None and self._why_dead is None:
            self._process.send(frame)

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self.start_draining()
        self._end(STOPPED)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._process is not None:
            await self._process.end(self._limits.stop_patience_s)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _LostWhileStarting(Exception):
    """The connection closed before Ready or Failed."""
