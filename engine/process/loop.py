"""The thread that owns an engine core: frames in, frames out, nothing else touches the core.

Knows when to step, when to sleep and when to give up. Does not know processes or sockets: it reads frames
from a queue and hands others to a function. Questions about the cache are answered between two steps;
grammars are compiled beside them, and a request waits for its own.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from engine.errors import QuireError
from engine.process import frames
from engine.process.grammars import GrammarDesk
from engine.types import EngineSnapshot, FinishReason, TokenOutput

if TYPE_CHECKING:  # the server's process has no core, and starts sooner without
    from engine.core import EngineCore

log = logging.getLogger(__name__)

SNAPSHOT_INTERVAL_S = 0.2
FRAME_INTERVAL_S = 0.2
# Of answers before the next step; one is always given.
ANSWERS_S = 0.02


class Compiled(NamedTuple):
    """The grammar that a request waited for is ready, or is none."""

    submit: frames.Submit
    problem: str | None


Command = frames.ToEngine | Compiled
Emit = Callable[[frames.Outputs | frames.Answer | frames.Pool], None]


class EngineLoop:
    """Runs a core until told to quit. `put` may be called from any thread.

    Attributes:
        busy_since: monotonic time at which the present step, or answer, began; 0.0 between them.
    """

    def __init__(self, core: EngineCore, emit: Emit) -> None:
        self._core = core
        self._emit = emit
        self._camera = _Camera(core, emit)
        self._grammars = GrammarDesk(core.grammars)
        self._waiting: dict[str, list[frames.Abort]] = {}  # for a grammar, and what came meanwhile
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._questions: deque[frames.Question] = deque()
        self._refused: list[TokenOutput] = []
        self._out_of_memory = 0
        self._snapshot_s = 0.0
        self.busy_since = 0.0

    def put(self, command: Command) -> None:
        if isinstance(command, frames.Compile):
            number = command.number
            self._grammars.compile(
                command.grammar, lambda problem: self._emit(frames.Answer(number, refusal=problem))
            )
        else:
            self._inbox.put(command)

    def run(self) -> None:
        """Steps while there is work and waits, without spinning, while there is none.

        Raises:
            Exception: a step broke in a way that no single request is to blame for.
        """
        while self._take_commands():
            self._answer_some()
            outputs = self._step() if self._core.has_work else []
            if self._refused:
                outputs, self._refused = [*self._refused, *outputs], []
            snapshot = self._due_snapshot()
            if outputs or snapshot is not None:
                self._emit(frames.Outputs(outputs, snapshot))
            self._camera.shoot_if_due()
        self._grammars.close()

    def _take_commands(self) -> bool:
        """Applies what was asked; waits for it if there is nothing else to do. False on Shutdown."""
        idle = not self._core.has_work and not self._questions
        try:
            command = self._wait() if idle else self._inbox.get_nowait()
            while not isinstance(command, frames.Shutdown):
                self._apply(command)
                command = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _wait(self) -> Command:
        """The next command, whenever it comes. Meanwhile the core gets ready for later steps, bit by bit."""
        while self._inbox.empty() and self._camera.due_in_s() != 0.0 and self._core.prepare():
            pass
        return self._inbox.get(timeout=self._camera.due_in_s())

    def _apply(self, command: Command) -> None:
        if isinstance(command, frames.Submit):
            self._add_when_ready(command)
        elif isinstance(command, Compiled):
            self._add_compiled(command)
        elif isinstance(command, frames.Abort):
            self._abort(command)
        elif isinstance(command, frames.Watch):
            self._camera.watch(command.on)
        elif isinstance(command, frames.Question):
            self._questions.append(command)

    def _answer_some(self) -> None:
        """In their order, and not for long: however much is asked, requests go on, and aborts are heard."""
        began_s = time.monotonic()
        while self._questions:
            self.busy_since = time.monotonic()
            self._emit(answer(self._core, self._questions.popleft()))
            self.busy_since = 0.0
            if time.monotonic() - began_s >= ANSWERS_S:
                break

    def _add_when_ready(self, command: frames.Submit) -> None:
        """A client has the grammar compiled before it submits, but it may be forgotten since."""
        grammar = command.params.grammar
        if grammar is None or not self._grammars.must_compile(grammar):
            self._add(command)
            return
        self._waiting[command.request_id] = []
        self._grammars.compile(grammar, lambda problem: self.put(Compiled(command, problem)))

    def _add_compiled(self, command: Compiled) -> None:
        submit, problem = command
        aborts = self._waiting.pop(submit.request_id)
        if problem is not None:
            self._refuse(submit, problem)
            return
        self._add(submit)
        for abort in aborts:
            self._core.abort(abort.request_id, abort.index)

    def _abort(self, command: frames.Abort) -> None:
        if command.request_id in self._waiting:
            self._waiting[command.request_id].append(command)
        else:
            self._core.abort(command.request_id, command.index)

    def _add(self, command: frames.Submit) -> None:
        try:
            ids = frames.unpack_ids(command.prompt_ids)
            self._core.add(command.request_id, ids, command.params, command.scope, command.explain)
        except QuireError as error:
            self._refuse(command, str(error))
        except Exception:
            log.exception("a request could not be added")
            self._refuse(command, "The engine could not take this request.")

    def _refuse(self, command: frames.Submit, message: str) -> None:
        """Every submitted choice ends in exactly one terminal output, also one that never began."""
        self._refused += (
            TokenOutput(command.request_id, index, None, FinishReason.ERROR, error=message)
            for index in range(command.params.n)
        )

    def _step(self) -> list[TokenOutput]:
        self.busy_since = time.monotonic()
        try:
            outputs = self._core.step()
            self._out_of_memory = 0
        except Exception as error:
            outputs = self._survive(error)
        self.busy_since = 0.0
        self._camera.stepped = True
        return outputs

    def _survive(self, error: Exception) -> list[TokenOutput]:
        """Running out of memory need not be the end: the core is consistent, its requests are queued again.

        The first time they are tried again, the second time failed; a third time nothing helps.
        """
        self._out_of_memory += 1
        # torch's own is a RuntimeError, and this layer does not import torch.
        name = type(error).__name__
        if not (isinstance(error, MemoryError) or name == "OutOfMemoryError") or self._out_of_memory > 2:
            raise error
        log.error(
            "a step ran out of memory (%s)",
            "trying again" if self._out_of_memory == 1 else "failing requests",
        )
        if self._out_of_memory == 2:
            self._core.fail(None, "The engine ran out of memory.")
        return []

    def _due_snapshot(self) -> EngineSnapshot | None:
        """Every so often, and always before the loop goes to sleep, so that the last one is true."""
        now = time.monotonic()
        if self._core.has_work and now - self._snapshot_s < SNAPSHOT_INTERVAL_S:
            return None
        self._snapshot_s = now
        return self._core.snapshot()


def answer(core: EngineCore, question: frames.Question) -> frames.Answer:
    """Asks the core. Whatever goes wrong is the asker's alone."""
    number = question.number
    try:
        if isinstance(question, frames.Probe):
            report = core.probe(frames.unpack_ids(question.prompt_ids), question.scope)
            return frames.Answer(number, report=report)
        if isinstance(question, frames.Page):
            page = core.cache_page(question.first_block, question.limit, question.state)
            return frames.Answer(number, page=page)
        if isinstance(question, frames.Block):
            return frames.Answer(number, block=core.cache_block(question.block_id))
        assert isinstance(question, frames.Reset), "grammars are compiled elsewhere"
        return frames.Answer(number, emptied=core.reset_prefix_cache())
    except QuireError as error:
        return frames.Answer(number, error=str(error))
    except Exception:
        log.exception("a question about the cache failed")
        return frames.Answer(number, error="The engine could not answer.")


class _Camera:
    """Shows the pool to those who watch, now and then while anything changes; does nothing without them.

    Attributes:
        stepped: a step was done since the last frame, so that what requests do has changed.
    """

    def __init__(self, core: EngineCore, emit: Emit) -> None:
        self._core = core
        self._emit = emit
        self._watched = self._full = False
        self._last_s = 0.0
        self.stepped = False

    def watch(self, on: bool) -> None:
        """The next frame is a full one; or there is none any more."""
        self._core.watch(on)
        self._watched = self._full = on

    def due_in_s(self) -> float | None:
        """How long until the next frame; None where there is nothing new to show."""
        if self._watched and (self._full or self.stepped or self._core.pool_changed):
            return max(self._last_s + FRAME_INTERVAL_S - time.monotonic(), 0.0)
        return None

    def shoot_if_due(self) -> None:
        if self.due_in_s() != 0.0:
            return
        try:
            frame = self._core.frame(self._full)
        except Exception:  # who looks on must not end what he looks at
            log.exception("the pool could not be shown")
            self.watch(False)
            return
        self._emit(frames.Pool(frame))
        self._last_s = time.monotonic()
        self._full = self.stepped = False
