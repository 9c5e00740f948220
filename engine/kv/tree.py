"""Which published block goes on from which, and what one tenant has under which salts.

Only to explain misses and to show the cache: nothing is served by it. It knows keys and block ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from engine.request import BlockKey

# Where a block hangs: on its parent's digest, or, a first block, on its salt.
Place = bytes | tuple[bytes]


class PrefixTree:
    """Siblings are linked through their block ids, the newest first; every change is O(1).

    Args:
        content_bytes: of a full block's tokens.
    """

    def __init__(self, content_bytes: int) -> None:
        self._content_bytes = content_bytes
        self._newest: dict[Place, int] = {}
        self._older = array("I", [0])
        self._newer = array("I", [0])
        self._salts: dict[tuple[str, bytes], set[bytes]] = {}  # (tenant, a first block's tokens)

    def place(self, key: BlockKey) -> Place:
        return (self.split(key)[0],) if key.parent is None else key.parent.digest

    def add(self, key: BlockKey, block_id: int, tenant: str) -> None:
        """A block was published."""
        place = self.place(key)
        sibling = self._newest.get(place, 0)
        self._newest[place] = block_id
        if block_id >= len(self._older):
            missing = block_id + 1 - len(self._older)
            self._older.extend([0] * missing)
            self._newer.extend([0] * missing)
        self._older[block_id], self._newer[block_id] = sibling, 0
        if sibling:
            self._newer[sibling] = block_id
        if key.parent is None:
            salt, tokens = self.split(key)
            self._salts.setdefault((tenant, tokens), set()).add(salt)

    def remove(self, key: BlockKey, block_id: int, tenant: str) -> None:
        """A published block lost its content."""
        older, newer = self._older[block_id], self._newer[block_id]
        if older:
            self._newer[older] = newer
        if newer:
            self._older[newer] = older
        elif older:
            self._newest[self.place(key)] = older
        else:
            del self._newest[self.place(key)]
        if key.parent is None:
            salt, tokens = self.split(key)
            salts = self._salts[tenant, tokens]
            salts.remove(salt)
            if not salts:
                del self._salts[tenant, tokens]

    def clear(self) -> None:
        self._newest.clear()
        self._salts.clear()

    def goes_on(self, place: Place) -> bool:
        """Whether any block hangs there."""
        return place in self._newest

    def children(self, place: Place) -> Iterator[int]:
        """The blocks that hang there, the newest first."""
        block_id = self._newest.get(place, 0)
        while block_id:
            yield block_id
            block_id = self._older[block_id]

    def has_other_salt(self, tenant: str, tokens: bytes, salt: bytes) -> bool:
        """Whether the tenant published a first block of these tokens under another salt. O(1): there may be
        one for each of its users."""
        salts = self._salts.get((tenant, tokens), ())
        return len(salts) > (salt in salts)

    def split(self, key: BlockKey) -> tuple[bytes, bytes]:
        """A first block's salt and its tokens."""
        return key.content[: -self._content_bytes], key.content[-self._content_bytes :]
