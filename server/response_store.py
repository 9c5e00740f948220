"""Responses that callers may ask for again: bounded in number and bytes, each tenant's own.

Knows bytes and ids; does not know what a response is. What is kept is text in memory: a restart forgets it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MAX_RESPONSES = 10_000
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """One response, as JSON.

    Attributes:
        body: the whole object.
        inputs, outputs: the items that it added to its conversation.
        previous: the response before it in the conversation.
    """

    body: bytes
    inputs: bytes
    outputs: bytes
    previous: str | None = None

    @property
    def size(self) -> int:
        return len(self.body) + len(self.inputs) + len(self.outputs)


class ResponseStore:
    """Keeps what was used last.

    When there is too much, the tenant that holds the most bytes loses what it has not used for longest, so
    that nobody's are pushed out by another's many.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._tenants: dict[str, OrderedDict[str, Stored]] = {}
        self._bytes: dict[str, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        return sum(self._bytes.values())

    def put(self, tenant: str, response_id: str, stored: Stored) -> None:
        self.remove(tenant, response_id)
        self._tenants.setdefault(tenant, OrderedDict())[response_id] = stored
        self._bytes[tenant] = self._bytes.get(tenant, 0) + stored.size
        self._count += 1
        while self._count > self._max_responses or self.bytes > self._max_bytes:
            largest = max(self._bytes, key=self._bytes.__getitem__)
            self.remove(largest, next(iter(self._tenants[largest])))

    def get(self, tenant: str, response_id: str) -> Stored | None:
        stored = self._tenants.get(tenant, OrderedDict()).get(response_id)
        if stored is not None:
            self._tenants[tenant].move_to_end(response_id)
        return stored

    def chain(self, tenant: str, response_id: str) -> list[Stored] | None:
        """A response and all before it in its conversation, the first one first; None if one is gone."""
        found: list[Stored] = []
        wanted: str | None = response_id
        while wanted is not None:
            stored = self.get(tenant, wanted)
            if stored is None:
                return None
            found.append(stored)
            wanted = stored.previous
        return found[::-1]

    def remove(self, tenant: str, response_id: str) -> bool:
        """Whether there was one."""
        stored = self._tenants.get(tenant, OrderedDict()).pop(response_id, None)
        if stored is None:
            return False
        self._count -= 1
        self._bytes[tenant] -= stored.size
        if not self._tenants[tenant]:
            del self._tenants[tenant], self._bytes[tenant]
        return True
