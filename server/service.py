"""What every route needs, held in one object that `create_app` makes: the engine, the text tools, the phase.

Knows which phase the server is in and starts and stops the engine with it; does not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Mapping
from enum import Enum, unique

from engine.client import EngineClient
from engine.types import EngineInfo
from server import __version__
from server.errors import RETRY_AFTER_S, ApiError
from server.history import History
from server.live import Feed
from server.metrics import Metrics
from server.parsing.chosen import choose
from server.prompts import Prompts, Template, Tokenizer
from server.settings import ServerSettings

STOP_TIMEOUT_S = 10.0


@unique
class Phase(Enum):
    """Where the server is in its life. It only moves down this list."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"  # the engine could not start
    DRAINING = "draining"


class Service:
    """The server's state. One per app, no other."""

    def __init__(
        self,
        client: EngineClient,
        settings: ServerSettings,
        tokenizer: Tokenizer,
        template: Template | None,
        sampling_defaults: Mapping[str, float],
    ) -> None:
        self.client = client
        self.settings = settings
        self.prompts = Prompts(tokenizer, template)
        self.notations = choose(
            template.sources if template is not None else {},
            settings.tool_call_parser,
            settings.reasoning_parser,
        )
        self.tenants = settings.tenants()
        self.metrics = Metrics(
            client,
            settings.model_name,
            compat=settings.metrics_compat,
            tenants=self.tenants.names,
            cache_isolation=self.tenants.isolated,
        )
        self.history = History(self.metrics)
        self.feed = Feed(self)
        self.model_name = settings.model_name
        self.sampling_defaults = sampling_defaults
        self.created = int(time.time())
        self.phase = Phase.STARTING
        self.started = asyncio.Event()
        self.failure: BaseException | None = None
        self.fingerprint = ""
        self._starting: asyncio.Task[None] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompts.tokenizer

    @property
    def info(self) -> EngineInfo:
        return self.client.info

    def begin(self) -> None:
        """Starts the engine in the background, so that probes are answered while weights load."""
        self._starting = asyncio.create_task(self._start(), name="engine-start")
        self.history.start()

    async def _start(self) -> None:
        try:
            info = await self.client.start()
        except BaseException as exc:
            self.failure = exc
            self.phase = Phase.FAILED
            if not isinstance(exc, Exception):
                raise
        else:
            self.fingerprint = _fingerprint(info)
            self.metrics.engine_started()
            if self.phase is Phase.STARTING:
                self.phase = Phase.READY
        finally:
            self.started.set()

    def drain(self) -> None:
        """From now on nothing new is taken."""
        self.phase = Phase.DRAINING
        self.feed.close()
        self.client.start_draining()

    async def end(self) -> None:
        """Stops the engine; what is in flight ends with an error."""
        self.feed.close()
        await self.history.stop()
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait({self._starting})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.client.stop(), STOP_TIMEOUT_S)
        self.prompts.close()

    def why_not_ready(self) -> ApiError | None:
        """None when a request can be served, else the refusal to send."""
        if self.phase is Phase.READY:
            return None
        retry = {"retry-after": str(RETRY_AFTER_S)}
        if self.phase is Phase.STARTING:
            return ApiError(503, "The model is still loading.", code="loading", headers=retry)
        if self.phase is Phase.DRAINING:
            closing = {**retry, "connection": "close"}
            return ApiError(
                503,
                "The server is shutting down and takes no new requests.",
                code="shutting_down",
                headers=closing,
            )
        return ApiError(503, "The engine could not start; see the server's log.", code="engine_unavailable")


def _fingerprint(info: EngineInfo) -> str:
    """Changes when the same request may give another text."""
    parts = (__version__, info.model, info.architecture, info.dtype, info.backend, str(info.vocab_size))
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
