"""What somebody who looks at the engine sees: blocks, pages of them, lanes. It changes nothing.

Its cost is bounded, because the engine stands still meanwhile.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import islice

from engine.errors import InvalidRequest
from engine.kv.manager import KVManager
from engine.request import Request, Status
from engine.views import BlockDetail, BlockView, CachePage, Lane

MAX_RUNNING_LANES = 256
MAX_WAITING_LANES = 64
MAX_PAGE_BLOCKS = 10_000
# Blocks looked at for one page, where most of them are in another state than the one asked for.
MAX_SCANNED_BLOCKS = 20_000
# A system prompt's blocks are in the page tables of all requests, and thousands of prompts go on from them.
MAX_HOLDERS = 32
MAX_CHILDREN = 1000
STATES = ("free", "cached", "in_use", "shared")


class Showcase:
    """Reads one KV cache on behalf of those who look.

    Args:
        kv: the bookkeeping; its time is the time of the views.
    """

    def __init__(self, kv: KVManager) -> None:
        self._kv = kv

    def page(self, live: Iterable[Request], first_block: int, limit: int, state: str) -> CachePage:
        """Blocks from `first_block` on; all of them, or those in one state.

        Args:
            live: all choices that may hold blocks.

        Raises:
            InvalidRequest: there is no such state.
        """
        if state and state not in STATES:
            raise InvalidRequest(f"state must be one of {', '.join(STATES)}; got {state!r}.", "state")
        limit = max(1, min(limit, MAX_PAGE_BLOCKS))
        first = max(first_block, 1)
        end = min(first + MAX_SCANNED_BLOCKS, self._kv.pool.num_blocks + 1)
        fitting = (block_id for block_id in range(first, end) if not state or self._state(block_id) == state)
        block_ids = list(islice(fitting, limit))
        if len(block_ids) == limit:
            end = block_ids[-1] + 1
        holders = self._holders(live, block_ids)
        views = tuple(self._view(block_id, holders.get(block_id, ())) for block_id in block_ids)
        return CachePage(views, end if end <= self._kv.pool.num_blocks else None)

    def block(self, live: Iterable[Request], block_id: int) -> BlockDetail | None:
        """One block with its tokens, as far as they are known; None where there is no such block."""
        if not 1 <= block_id <= self._kv.pool.num_blocks:
            return None
        holders = self._holders(live, [block_id]).get(block_id, ())
        view = self._view(block_id, holders)
        children = self._kv.prefix.children_of(block_id, MAX_CHILDREN)
        return BlockDetail(view, self._token_ids(view, holders), children)

    def _state(self, block_id: int) -> str:
        refs = self._kv.pool.ref(block_id)
        if refs == 0:
            return "cached" if self._kv.pool.is_kept(block_id) else "free"
        return "in_use" if refs == 1 else "shared"

    def _holders(self, live: Iterable[Request], block_ids: Iterable[int]) -> dict[int, list[Request]]:
        """Who has these blocks: of each, the furthest choice of each of MAX_HOLDERS requests at most."""
        wanted = {block_id for block_id in block_ids if self._kv.pool.ref(block_id)}
        holders: dict[int, dict[str, Request]] = {block_id: {} for block_id in wanted}
        for request in live:
            if not wanted:
                break
            held = wanted.intersection(request.block_ids)
            if request.copy_source in wanted:
                held.add(request.copy_source)
            for block_id in held:
                known = holders[block_id]
                if known.setdefault(request.request_id, request).computed < request.computed:
                    known[request.request_id] = request
                if len(known) == MAX_HOLDERS:
                    wanted.remove(block_id)
        return {block_id: list(known.values()) for block_id, known in holders.items()}

    def _view(self, block_id: int, holders: Sequence[Request]) -> BlockView:
        state = self._state(block_id)
        if state == "free":
            return BlockView(block_id, state)
        facts = self._kv.pool.facts
        key = self._kv.prefix.key_of(block_id)
        owner, now_ds = facts.owners[block_id], facts.now_ds
        return BlockView(
            block_id,
            state,
            tenant=facts.tenant_names[facts.tenants[block_id]],
            owner=str(owner) if owner else "",
            holders=tuple(request.request_id for request in holders),
            position=facts.positions[block_id],
            tokens=self._tokens(block_id, holders),
            digest="" if key is None else key.digest.hex()[:16],
            parent=facts.parents[block_id],
            age_s=(now_ds - facts.taken_ds[block_id]) / 10,
            idle_s=(now_ds - facts.idle_ds[block_id]) / 10 if state == "cached" else None,
        )

    def _tokens(self, block_id: int, holders: Sequence[Request]) -> int:
        """How many of its slots are computed, or will be once the steps in flight end."""
        if self._kv.pool.is_kept(block_id):
            return self._kv.block_size
        start = self._kv.pool.facts.positions[block_id] * self._kv.block_size
        # Who has yet to copy the block has computed as much of it as it wants to copy.
        return max((min(request.computed - start, self._kv.block_size) for request in holders), default=0)

    def _token_ids(self, view: BlockView, holders: Sequence[Request]) -> tuple[int, ...]:
        key = self._kv.prefix.key_of(view.block_id)
        if key is not None:
            return tuple(array("I", key.content[-4 * self._kv.block_size :]))
        start = view.position * self._kv.block_size
        furthest = max(holders, key=lambda request: request.computed, default=None)
        return () if furthest is None else tuple(furthest.token_ids[start : start + view.tokens])


def lanes(
    running: Sequence[Request], waiting: Iterable[Request], num_live: int, now_s: float
) -> tuple[tuple[Lane, ...], int]:
    """The running choices in their order, then those next in the queue; and how many are left out."""
    queued = (choice for leader in waiting for choice in (leader, *leader.followers))
    behind = (follower for leader in running for follower in leader.followers)
    shown = [
        *running[:MAX_RUNNING_LANES],
        *islice((choice for group in (behind, queued) for choice in group), MAX_WAITING_LANES),
    ]
    return tuple(_lane(request, now_s) for request in shown), num_live - len(shown)


def _lane(request: Request, now_s: float) -> Lane:
    return Lane(
        request.request_id,
        request.index,
        request.scope.tenant,
        _phase(request),
        request.prompt_len,
        request.cached_tokens,
        request.computed,
        request.num_output,
        len(request.block_ids),
        request.preemptions,
        now_s - request.arrival_s,
        request.params.priority,
    )


def _phase(request: Request) -> str:
    if request.status is Status.WAITING:
        return "preempted" if request.preemptions else "queued"
    # After a preemption what was said is computed again, and that is prefill too.
    return "decode" if request.num_output and request.remaining <= 1 else "prefill"
