"""Metrics: the books, the engine's state, and the page that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from engine.client import EngineClient
from server.metrics import native, vllm
from server.metrics.records import Records
from server.metrics.state import State, read

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Records):
    """All series of one server, in a registry of its own.

    Args:
        model_name: what requests call the model.
        compat: "vllm" adds the names of vLLM.
        tenants: the configured ones; their series exist before they come.
        cache_isolation: tenants do not share cached prefixes.
    """

    def __init__(
        self,
        client: EngineClient,
        model_name: str = "",
        *,
        compat: str = "none",
        tenants: Sequence[str] = (),
        cache_isolation: bool = False,
    ) -> None:
        super().__init__()
        self._client = client
        self._model = model_name
        self._compat = compat
        self._tenants = tuple(tenants)
        self._cache_isolation = cache_isolation
        self._started = False
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def engine_started(self) -> None:
        """From now on the engine is asked."""
        self._started = True

    def state(self) -> State:
        """The engine at this moment."""
        return read(self._client) if self._started else State()

    def text(self) -> bytes:
        """The exposition. One state of the engine in all of it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        state = self.state()
        yield from native.engine(state, self._tenants, self._cache_isolation)
        yield from native.server(self, state, self._model)
        if self._compat == "vllm":
            yield from vllm.families(state, self, self._model)
