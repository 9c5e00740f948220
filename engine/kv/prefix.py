"""Which block holds which tokens. It knows content and block ids, not references or requests' state.

A full block is known by its tokens *and everything before them*: a chain of SHA-256 digests finds a
candidate, the bytes of the whole chain decide. Walking a chain from its start makes the second part cheap:
once block i is verified, block i + 1 needs its own bytes compared and its parent to be block i.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
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


class Published(NamedTuple):
    """Blocks that others may find from now on.

    Attributes:
        parents: the published block before each, 0 where there is none.
        reunited: those that blocks published before go on from, perhaps.
    """

    block_ids: list[int]
    parents: list[int]
    reunited: list[int]


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

    def hash_blocks(self, request: Request, blocks: int) -> None:
        """Hashes the next of the request's full blocks, so that less is to do later."""
        self._hash(request, len(request.block_keys) + blocks)

    def find(self, request: Request, first: int, end: int) -> list[int]:
        """Returns the published blocks that hold the request's tokens from its block `first` on, as far as
        there are any, before `end`. Those before `first` were found earlier."""
        found: list[int] = []
        keys, entries = request.block_keys, self._entries
        parent = keys[first - 1] if first else None
        for index in range(first, end):
            key = keys[index] if index < len(keys) else self._key(request, index)
            key.parent = parent
            entry = entries.get(key.digest)
            if entry is None or not same_content(entry.key, key):
                break
            # From here on the request holds the published key itself, so that the next comparison
            # ends at once; and a chain whose parent was evicted and came back is joined again.
            if index:
                entry.key.parent = parent
            parent = keys[index] = entry.key
            found.append(entry.block_id)
        return found

    def common_blocks(self, one: Request, other: Request, first: int, end: int) -> int:
        """How many leading blocks two requests share, `first` at least and `end` at most, as far as both are
        hashed. By their digests alone: it says what is likely, and never shares anything."""
        ones, others = one.block_keys, other.block_keys
        blocks = range(first, max(first, min(end, len(ones), len(others))))
        # A digest covers all blocks before, so from the first difference on all differ.
        return first + bisect_left(blocks, True, key=lambda i: ones[i].digest != others[i].digest)

    def is_block(self, request: Request, index: int, key: BlockKey) -> bool:
        """Whether that is the request's block `index`, as far as it is hashed."""
        keys = request.block_keys
        return index < len(keys) and keys[index].digest == key.digest and same_content(keys[index], key)

    def look(self, request: Request, index: int) -> tuple[BlockKey, Entry | None]:
        """The key of the request's block `index`, and who has that content."""
        key = self._key(request, index)
        if index:
            key.parent = request.block_keys[index - 1]
        return key, self._entry(key)

    def digests(self, request: Request, blocks: int) -> Iterator[bytes]:
        """The digests of the request's first blocks, which all tokens are known of."""
        keys = request.block_keys
        if len(keys) >= blocks:
            return (key.digest for key in islice(keys, blocks))
        return (self._key(request, index).digest for index in range(blocks))

    def publish(self, request: Request, block_ids: Sequence[int], first: int, end: int) -> Published:
        """Enters the request's blocks from `first` on, before `end`, whose tokens are all computed.

        Args:
            block_ids: its page table; it may have given it up since.

        Where other content owns the digest or another block has this content, the first stays.
        """
        self._hash(request, end)
        keys, entries, tenant = request.block_keys, self._entries, request.scope.tenant
        published = Published([], [], [])
        parent_id = self._block_of(keys[first - 1]) if first else 0
        for index in range(first, end):
            key, block_id = keys[index], block_ids[index]
            if index:  # as in `find`: the comparison ends where the request holds a published key itself
                key.parent = keys[index - 1]
            entry = entries.get(key.digest)
            if entry is None:
                published.block_ids.append(block_id)
                published.parents.append(parent_id)
                if self.tree.goes_on(key.digest):
                    published.reunited.append(block_id)
                entries[key.digest] = Entry(key, block_id, tenant)
                self._key_of[block_id] = key
                self.tree.add(key, block_id, tenant)
                parent_id = block_id
            elif same_content(entry.key, key):
                keys[index], parent_id = entry.key, entry.block_id
            else:
                parent_id = 0
        return published

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
        return 0 if key is None or key.parent is None else self._block_of(key.parent)

    def _entry(self, key: BlockKey) -> Entry | None:
        """The published block of that content, if there is one."""
        entry = self._entries.get(key.digest)
        return entry if entry is not None and same_content(entry.key, key) else None

    def _block_of(self, key: BlockKey) -> int:
        entry = self._entry(key)
        return 0 if entry is None else entry.block_id

    def children_of(self, block_id: int, most: int | None = None) -> tuple[int, ...]:
        """The published blocks that go on from a published one, the newest first; `most`: of them."""
        key = self._key_of.get(block_id)
        if key is None or not self.tree.goes_on(key.digest):  # mostly
            return ()
        joined = (child for child in self.tree.children(key.digest) if self.parent_of(child) == block_id)
        return tuple(islice(joined, most))

    def has_digest(self, digest: bytes) -> bool:
        """Whether a block of that digest is published; for statistics, tokens are not compared."""
        return digest in self._entries

    def key_of(self, block_id: int) -> BlockKey | None:
        return self._key_of.get(block_id)

    def digests_of(self, block_ids: Sequence[int]) -> list[bytes]:
        """Of published blocks."""
        return [self._key_of[block_id].digest for block_id in block_ids]

    def content_of(self, block_id: int) -> bytes:
        """The bytes a published block is known by."""
        return self._key_of[block_id].content

    def tenant_of(self, block_id: int) -> str:
        """On whose account a published block was computed."""
        return self._entries[self._key_of[block_id].digest].tenant

    def _contents(self, request: Request, first: int, end: int) -> list[bytes]:
        """The bytes blocks are known by. The first block's start with the salt: all else depends on it."""
        tokens = array("I", request.token_ids[first * self._block_size : end * self._block_size]).tobytes()
        size = 4 * self._block_size
        contents = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        if first == 0 and contents:
            contents[0] = request.salt + contents[0]
        return contents

    def _key(self, request: Request, index: int) -> BlockKey:
        if len(request.block_keys) <= index:
            self._hash(request, index + 1)
        return request.block_keys[index]

    def _hash(self, request: Request, end: int) -> None:
        """Makes the keys of the request's first `end` blocks."""
        keys, digest = request.block_keys, self._digest
        if len(keys) >= end:
            return
        parent = keys[-1] if keys else None
        for content in self._contents(request, len(keys), end):
            parent = BlockKey(digest((parent.digest if parent else b"") + content), content, parent)
            keys.append(parent)
