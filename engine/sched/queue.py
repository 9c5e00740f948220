"""Who is admitted next. It knows the order of requests, not whether there is room for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from engine.request import Request


class QueuePolicy(Protocol):
    """An order of waiting requests. All operations are O(1), or O(log n) for a sorted one."""

    def push(self, request: Request) -> None:
        """A new request."""
        ...

    def put_back(self, request: Request) -> None:
        """A request that was admitted before and lost its place: it goes before all others."""
        ...

    def peek(self) -> Request:
        """The next request; the queue is not empty."""
        ...

    def remove(self, request: Request) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


class FcfsQueue:
    """First come, first served."""

    def __init__(self) -> None:
        self._requests: OrderedDict[Request, None] = OrderedDict()

    def push(self, request: Request) -> None:
        self._requests[request] = None

    def put_back(self, request: Request) -> None:
        self._requests[request] = None
        self._requests.move_to_end(request, last=False)

    def peek(self) -> Request:
        return next(iter(self._requests))

    def remove(self, request: Request) -> None:
        del self._requests[request]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)
