"""Why the reuse of a prompt ended where it did. It reads what the cache knows and changes none of it.

The answer is about one block: the first that was not reused. A prompt is compared token by token with the
caller's own tenant's blocks only: whoever could do that with a stranger's could guess his text, one token
after the other. Where tenants share blocks, a full block of a stranger is said to be there, or to have been.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import islice

from engine.kv.ghosts import Ghosts
from engine.kv.prefix import PrefixCache
from engine.request import BlockKey, Request
from engine.views import CacheReport, MissReason

MAX_SIBLINGS = 256  # of the blocks that go on from the same place, the newest are compared
TOKENS_BEFORE = 8  # shown of what is cached, around the first difference
TOKENS_AFTER = 16


class Explainer:
    """Names the reason of a miss.

    Args:
        running: the requests that hold blocks and may still publish some.
    """

    def __init__(
        self, block_size: int, prefix: PrefixCache, ghosts: Ghosts, running: Iterable[Request]
    ) -> None:
        self._size = block_size
        self._prefix = prefix
        self._ghosts = ghosts
        self._running = running

    def report(self, request: Request, reused_blocks: int, now_s: float) -> CacheReport:
        """Explains what `PrefixCache.find` just returned for the request, which does not run yet."""
        length, start = request.prompt_len, reused_blocks * self._size
        left = length - start

        def because(reason: MissReason) -> CacheReport:
            return CacheReport(length, start, reason, at_token=start)

        if left < self._size:
            return because(MissReason.PARTIAL_BLOCK)
        key, entry = self._prefix.look(request, reused_blocks)
        if entry is not None:  # all of it is there: `match` stopped for the last token's sake
            return because(MissReason.LAST_TOKEN)
        if self._is_in_progress(key, reused_blocks):
            return because(MissReason.IN_PROGRESS)
        lost = self._ghosts.recall(key.digest)
        if lost is not None:
            age_s = max(now_s - lost[0], 0.0)
            return CacheReport(length, start, MissReason.EVICTED, start, age_s, lost[1])
        if reused_blocks == 0 and self._has_other_salt(request, key):
            return because(MissReason.OTHER_SALT)
        return self._diverged(request, key, start) or CacheReport(
            length, start, MissReason.NEVER_SEEN, start, memory_full=self._ghosts.overflowed
        )

    def _is_in_progress(self, key: BlockKey, index: int) -> bool:
        """Whether somebody computes the same block of his prompt and has not published it yet."""
        end = (index + 1) * self._size
        return any(
            other.num_published <= index
            and other.prompt_len >= end
            and self._prefix.is_block(other, index, key)
            for other in self._running
        )

    def _has_other_salt(self, request: Request, key: BlockKey) -> bool:
        tokens = key.content[len(request.salt) :]
        return self._prefix.tree.has_other_salt(request.scope.tenant, tokens, request.salt)

    def _diverged(self, request: Request, key: BlockKey, start: int) -> CacheReport | None:
        """The tenant's cached block of the same place that agrees with the prompt for longest, if any does:
        a first block must share a token at least. Where nobody asked, any such block will do. Of strangers'
        blocks it is said that there are some, not where they differ."""
        tree, size = self._prefix.tree, 4 * self._size
        own = key.content[-size:]
        longest, nearest, strangers = 0 if start == 0 else -1, b"", False
        for block_id in islice(tree.children(tree.place(key)), MAX_SIBLINGS):
            content = self._prefix.content_of(block_id)
            if not content.startswith(own[: 4 * longest + 4], len(content) - size):
                continue
            if self._prefix.tenant_of(block_id) != request.scope.tenant:
                strangers = True
                continue
            nearest = content[-size:]
            longest = common_tokens(own, nearest)
            if not request.explain:
                break
        if nearest:
            first = max(longest - TOKENS_BEFORE, 0)
            return CacheReport(
                request.prompt_len,
                start,
                MissReason.DIVERGED,
                start + longest,
                cached_ids=tuple(array("I", nearest)[first : longest + TOKENS_AFTER]),
                context_start=start + first,
            )
        if strangers and start:
            return CacheReport(request.prompt_len, start, MissReason.DIVERGED, start)
        return None


def common_tokens(one: bytes, other: bytes) -> int:
    """How many leading tokens two blocks of the same size share.

    >>> common_tokens(array("I", [7, 8, 9]).tobytes(), array("I", [7, 8, 5]).tobytes())
    2
    """
    difference = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return (len(one) - (difference.bit_length() + 7) // 8) // 4


def whatif_hits(
    request: Request, limit: int, hit_blocks: int, prefix: PrefixCache, ghosts: Ghosts
) -> list[int]:
    """The leading blocks of the request, `limit` at most, that a pool of each size would have.

    A content in use is in use in a pool of any size. Ends where no size goes on.
    """
    found = [limit] * ghosts.nowhere
    smallest = 0  # of the sizes that had everything so far
    for index, zone in enumerate(ghosts.zones(prefix.digests(request, limit))):
        if zone < 0 and index >= hit_blocks and not prefix.has_digest(request.block_keys[index].digest):
            zone = ghosts.nowhere
        if zone > smallest:
            found[smallest:zone] = [index] * (zone - smallest)
            smallest = zone
            if zone == ghosts.nowhere:
                break
    return found
