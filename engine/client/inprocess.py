"""An engine on a thread of this process: for tests and for programs that embed Quire.

The same loop as in the engine process drives the core; outputs cross to the event loop in one call per step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.client.base import STOPPED, EngineClient
from engine.process import frames
from engine.process.loop import EngineLoop
from engine.text.tokenizer import Tokenizer
from engine.types import EngineInfo

if TYPE_CHECKING:
    from engine.core import EngineCore

log = logging.getLogger(__name__)

STOP_PATIENCE_S = 10.0


class InProcessClient(EngineClient):
    """An EngineClient around a core that the caller built.

    Args:
        core: owned by this client from `start` on; nobody else may touch it.
        step_timeout_s: `health` complains about a step that runs longer.
    """

    def __init__(
        self, core: EngineCore, info: EngineInfo, tokenizer: Tokenizer, *, step_timeout_s: float = 120.0
    ) -> None:
        super().__init__(tokenizer)
        self._info = info
        self._engine = EngineLoop(core, lambda frame: self._post(self._receive, frame))
        self._step_timeout_s = step_timeout_s
        self._snapshot = core.snapshot()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> EngineInfo:
        self._loop = asyncio.get_running_loop()
        self._why_dead = None
        self._thread.start()
        return self.info

    def _run(self) -> None:
        reason = STOPPED
        try:
            self._engine.run()
        except Exception:
            log.exception("the engine failed")
            reason = "The engine failed; see the log."
        self._post(self._end, reason)

    def _post(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._engine.put(frames.Shutdown())  # the event loop is closed: nobody listens any more

    def _send(self, frame: frames.ToEngine) -> None:
        self._engine.put(frame)

    def health(self) -> str | None:
        since = self._engine.busy_since
        if self._why_dead is None and since and time.monotonic() - since > self._step_timeout_s:
            return f"The engine has been in one step for more than {self._step_timeout_s:g} s."
        return self._why_dead

    async def stop(self) -> None:
        self.start_draining()
        self._end(STOPPED)
        if self._thread.is_alive():
            self._send(frames.Shutdown())
            await asyncio.to_thread(self._thread.join, STOP_PATIENCE_S)
