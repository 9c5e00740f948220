"""What all responses that stream events have in common. Knows ASGI; does not know what events say."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive


class EventsResponse(Response):
    """A stream that a subclass writes."""

    def __init__(self, cache_control: str, headers: Mapping[str, str] | None = None) -> None:
        # Proxies must neither keep nor gather what should be seen at once.
        common = {"cache-control": cache_control, "x-accel-buffering": "no"}
        super().__init__(headers={**common, **(headers or {})}, media_type="text/event-stream")
        del self.headers["content-length"]


async def reader_gone(receive: Receive) -> None:
    """Returns when nobody reads any more."""
    while (await receive())["type"] != "http.disconnect":
        pass
