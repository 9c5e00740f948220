"""What callers may expect of an engine, wherever it runs. The server and its tests see this only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from engine.types import EngineInfo, EngineSnapshot, SamplingParams, TokenEvent


class EngineClient(Protocol):
    """An engine, wherever it runs."""

    @property
    def info(self) -> EngineInfo:
        """What the engine decided at start-up; valid after `start`."""
        ...

    async def start(self) -> EngineInfo:
        """Starts the engine and waits until it serves.

        Raises:
            ConfigError: it cannot work; the message is for the operator.
        """
        ...

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncIterator[TokenEvent]:
        """Queues a request at once and returns its events, of all n choices interleaved.

        The iterator ends after every choice had its event with a finish_reason. Closing it early
        (`aclose`, cancellation) aborts what is left.

        Raises (before returning): RequestError, Overloaded, Draining, EngineDead.
        Raises (while iterating): EngineDead, when the engine dies under the request.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends what is left of a request; its iterator then ends. Unknown ids are ignored."""
        ...

    def snapshot(self) -> EngineSnapshot:
        """The newest state the engine reported."""
        ...

    def health(self) -> str | None:
        """None while the engine lives and makes progress, else what is wrong."""
        ...

    def start_draining(self) -> None:
        """From now on `submit` raises Draining."""
        ...

    async def drained(self) -> None:
        """Returns once nothing is in flight."""
        ...

    async def stop(self) -> None:
        """Ends the engine; whatever is in flight gets EngineDead."""
        ...
