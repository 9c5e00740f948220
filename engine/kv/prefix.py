"""Which block holds which tokens. It knows content and block ids, not references or requests' state.

A full block is known by its tokens *and everything before them*: a chain of SHA-256 digests finds a
candidate, the bytes of the whole chain decide. Walking a chain from its start makes the second part cheap:
once block i is verified, block i + 1 needs its own bytes compared and its parent to be block i.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, ItemsView
from hashlib import sha256
from itertools import islice
from typing import NamedTuple

from engine.kv.tree import PrefixTree
from engine.request import BlockKey, Request

Digest = Callable[[bytes], bytes]


def sha256_digest(data: bytes) -> bytes:
    return sha256(data).digest()


class Entry(NamedTuple):
    """A published block. `tenant`: on whose account it was computed."""

    key: BlockKey
    block_id: int
    tenant: str


def same_content(one: BlockKey | None, other: BlockKey | None) -> bool:
    """Whether two keys stand for the same tokens from the start. Ends at the first shared ancestor."""
    while one is not other:
        if one is None or other is None or one.content != other.content:
            return False
        one, other = one.parent, other.parent
    return True


class PrefixCache:
    """The map from content to block, one entry per digest and at most one per block.

    Args:
        digest: the hash. Any function is safe, a bad one only finds less.

    Attributes:
        tree: the published blocks by what they go on from.
    """

    def __init__(self, block_size: int, digest: Digest = sha256_digest) -> None:
        self._block_size = block_size
        self._digest = digest
        self._entries: dict[bytes, Entry] = {}
        self._key_of: dict[int, BlockKey] = {}
        self.tree = PrefixTree(4 * block_size)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, request: Request, max_blocks: int) -> list[int]:
        """Returns the published blocks that hold the request's first tokens, `max_blocks` at most."""
        found: list[int] = []
        parent: BlockKey | None = None
        for index in range(max_blocks):
            key = self._key(request, index)
            key.parent = parent
            entry = self._entries.get(key.digest)
            if entry is None or not same_content(entry.key, key):
                break
            # From here on the request holds the published key itself, so that the next comparison
            # ends at once; and a chain whose parent was evicted and came back is joined again.
            parent = request.block_keys[index] = entry.key
            if index:
                parent.parent = request.block_keys[index - 1]
            found.append(entry.block_id)
        return found

    def look(self, request: Request, index: int) -> tuple[BlockKey, Entry | None]:
        """The key of the request's block `index`, and who has that content."""
        key = self._key(request, index)
        if index:
            key.parent = request.block_keys[index - 1]
        entry = self._entries.get(key.digest)
        return key, entry if entry is not None and same_content(entry.key, key) else None

    def digest_at(self, request: Request, index: int) -> bytes:
        """The digest of the request's block `index`, which all tokens are known of."""
        return self._key(request, index).digest

    def publish(self, request: Request, index: int) -> bool:
        """Enters the request's block `index`, whose tokens are all computed.

        Returns:
            False where other content owns the digest or another block has this content: the first stays.
        """
        key = self._key(request, index)
        if index:  # as in `find`: the comparison ends where the request holds a published key itself
            key.parent = request.block_keys[index - 1]
        block_id = request.block_ids[index]
        entry = self._entries.get(key.digest)
        if entry is None:
            self._entries[key.digest] = Entry(key, block_id, request.scope.tenant)
            self._key_of[block_id] = key
            self.tree.add(key, block_id, request.scope.tenant)
            return True
        if same_content(entry.key, key):
            request.block_keys[index] = entry.key
        return False

    def forget(self, block_id: int) -> BlockKey:
        """The block's content is gone; returns what it was."""
        key = self._key_of.pop(block_id)
        self.tree.remove(key, block_id, self._entries.pop(key.digest).tenant)
        return key

    def clear(self) -> dict[int, BlockKey]:
        """Forgets everything and returns the blocks that were published, with what they held."""
        keys = dict(self._key_of)
        self._entries.clear()
        self._key_of.clear()
        self.tree.clear()
        return keys

    def parent_of(self, block_id: int) -> int:
        """The published block that holds the tokens before a published one's, 0 where there is none."""
        key = self._key_of.get(block_id)
        entry = None if key is None or key.parent is None else self._entries.get(key.parent.digest)
        return entry.block_id if entry and key and same_content(entry.key, key.parent) else 0

    def children_of(self, block_id: int, most: int | None = None) -> tuple[int, ...]:
        """The published blocks that go on from a published one, the newest first; `most`: of them."""
        key = self._key_of.get(block_id)
        if key is None or not self.tree.goes_on(key.digest):  # mostly
            return ()
        joined = (child for child in self.tree.children(key.digest) if self.parent_of(child) == block_id)
        return tuple(islice(joined, most))

    def entries(self) -> ItemsView[bytes, Entry]:
        return self._entries.items()

    def has_digest(self, digest: bytes) -> bool:
        """Whether a block of that digest is published; for statistics, tokens are not compared."""
        return digest in self._entries

    def key_of(self, block_id: int) -> BlockKey | None:
        return self._key_of.get(block_id)

    def content_of(self, block_id: int) -> bytes:
        """The bytes a published block is known by."""
        return self._key_of[block_id].content

    def tenant_of(self, block_id: int) -> str:
        """On whose account a published block was computed."""
        return self._entries[self._key_of[block_id].digest].tenant

    def content(self, request: Request, index: int) -> bytes:
        """The bytes a block is known by. The first block's start with the salt: all else depends on it."""
        start = index * self._block_size
        tokens = array("I", request.token_ids[start : start + self._block_size]).tobytes()
        return request.salt + tokens if index == 0 else tokens

    def _key(self, request: Request, index: int) -> BlockKey:
        keys = request.block_keys
        while len(keys) <= index:
            parent = keys[-1] if keys else None
            content = self.content(request, len(keys))
            keys.append(BlockKey(self._digest((parent.digest if parent else b"") + content), content, parent))
        return keys[index]
