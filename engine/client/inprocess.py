"""An engine on a thread of this process: for tests and for programs that embed Quire.

The same loop as in the engine process drives the core; outputs cross to the event loop in one call per step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from engine.client.desk_client import DeskClient
from engine.client.questions import QuestionDesk
from engine.client.requests import RequestTable
from engine.errors import EngineDead
from engine.process import frames
from engine.process.loop import Add, Cancel, Core, EngineLoop, Quit
from engine.text.detokenizer import DecodesTokens
from engine.types import EngineInfo, SamplingParams, TokenEvent
from engine.views import DEFAULT_SCOPE, CacheScope

log = logging.getLogger(__name__)

STOP_PATIENCE_S = 10.0


class InProcessClient(DeskClient):
    """An EngineClient around a core that the caller built.

    Args:
        core: owned by this client from `start` on; nobody else may touch it.
        step_timeout_s: `health` complains about a step that runs longer.
    """

    restarts = 0

    def __init__(
        self, core: Core, info: EngineInfo, tokenizer: DecodesTokens, *, step_timeout_s: float = 120.0
    ) -> None:
        self._info = info
        self._engine = EngineLoop(core, self._emit)
        self._table = RequestTable(tokenizer, lambda wire_id, index: self._engine.put(Cancel(wire_id, index)))
        self._desk = QuestionDesk(self._engine.put, lambda: self._dead)
        self._step_timeout_s = step_timeout_s
        self._snapshot = core.snapshot()
        self._dead: str | None = "The engine is not started."
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> EngineInfo:
        self._loop = asyncio.get_running_loop()
        self._dead = None
        self._thread.start()
        return self._info

    def _run(self) -> None:
        reason = "The engine was stopped."
        try:
            self._engine.run()
        except Exception:
            log.exception("the engine failed")
            reason = "The engine failed; see the log."
        self._post(self._die, reason)

    def _emit(self, frame: frames.Outputs | frames.Answer | frames.Pool) -> None:
        self._post(self._receive, frame)

    def _post(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._engine.put(Quit())  # the event loop is closed: nobody listens any more

    def _receive(self, frame: frames.Outputs | frames.Answer | frames.Pool) -> None:
        if not isinstance(frame, frames.Outputs):
            self._desk.receive(frame)
            return
        if frame.snapshot is not None:
            self._snapshot = frame.snapshot
        self._table.dispatch(frame.outputs)

    def _die(self, reason: str) -> None:
        self._dead = reason
        self._table.fail_all(reason)
        self._desk.fail_all(reason)

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        scope: CacheScope = DEFAULT_SCOPE,
        *,
        explain: bool = False,
    ) -> AsyncIterator[TokenEvent]:
        if self._dead is not None:
            raise EngineDead(self._dead)
        stream = self._table.admit(self._info, request_id, prompt_ids, params)
        self._engine.put(Add(stream.wire_id, list(prompt_ids), params, scope, explain))
        return stream

    def health(self) -> str | None:
        since = self._engine.busy_since
        if self._dead is None and since and time.monotonic() - since > self._step_timeout_s:
            return f"The engine has been in one step for more than {self._step_timeout_s:g} s."
        return self._dead

    async def stop(self) -> None:
        self.start_draining()
        self._die("The engine was stopped.")
        if self._thread.is_alive():
            self._engine.put(Quit())
            await asyncio.to_thread(self._thread.join, STOP_PATIENCE_S)
