"""The conservation law of the KV cache, stated once. Tests check it after each step; production looks
only whether blocks are left in use when nothing runs (`EngineCore.step`): the whole law takes too long.

It counts everything anew from the requests' page tables and compares; it changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from engine.kv.block_pool import PADDING_BLOCK, BlockPool
from engine.kv.ghosts import Ghosts
from engine.kv.page_table import split_for_fork
from engine.kv.prefix import PrefixCache
from engine.kv.tree import Place
from engine.request import Request, Status
from engine.views import WHATIF_SIZES

ACTUAL_SIZE = WHATIF_SIZES.index(1.0)


def check(
    pool: BlockPool,
    prefix: PrefixCache,
    ghosts: Ghosts,
    block_size: int,
    requests: Sequence[Request],
    leaving: Sequence[int] = (),
) -> None:
    """Raises AssertionError where pool, prefix cache, page tables and memory of the past do not add up.

    Args:
        leaving: blocks that requests which have left still hold, once for each.
    """
    holders = Counter(block_id for request in requests for block_id in _held(request))
    holders.update(leaving)
    _check_pool(pool, holders)
    _check_map(pool, prefix)
    _check_facts(pool, prefix, requests)
    _check_tree(prefix)
    _check_ghosts(pool, prefix, ghosts)
    for request in requests:
        _check_table(request, block_size)
        _check_published(request, prefix)
    _check_sharing(requests, block_size)


def _ensure(law: bool, broken: str) -> None:
    if not law:
        raise AssertionError(f"KV cache: {broken}")


def _held(request: Request) -> Iterator[int]:
    yield from request.block_ids
    if request.copy_source is not None:
        yield request.copy_source


def _check_pool(pool: BlockPool, holders: Counter[int]) -> None:
    free, idle = list(pool.free_ids()), list(pool.idle_ids())
    states = Counter(free) + Counter(idle) + Counter(holders.keys())
    _ensure(PADDING_BLOCK not in states, "the padding block was handed out")
    _ensure(
        len(states) == pool.num_blocks and max(states.values()) == 1,
        "free + idle + in use is not the pool, each block once",
    )
    for block_id in states:
        refs = holders[block_id]
        _ensure(pool.ref(block_id) == refs, f"block {block_id}: {pool.ref(block_id)} refs, {refs} holders")
    _ensure(pool.num_in_use == len(holders), "the count of blocks in use is wrong")
    _ensure(pool.num_shared == sum(refs > 1 for refs in holders.values()), "the count of shared is wrong")
    _ensure(all(map(pool.is_kept, idle)), "an idle block has no content")
    _ensure(not any(map(pool.is_kept, free)), "a free block has content")


def _check_map(pool: BlockPool, prefix: PrefixCache) -> None:
    published = {entry.block_id for _, entry in prefix.entries()}
    _ensure(len(published) == len(prefix), "two digests lead to one block")
    for digest, entry in prefix.entries():
        _ensure(entry.key.digest == digest, f"block {entry.block_id} is filed under another digest")
        _ensure(prefix.key_of(entry.block_id) is entry.key, f"block {entry.block_id} has another key")
    kept = {block_id for block_id in range(1, pool.num_blocks + 1) if pool.is_kept(block_id)}
    _ensure(kept == published, "the pool keeps other blocks than the prefix cache knows")


def _check_facts(pool: BlockPool, prefix: PrefixCache, requests: Sequence[Request]) -> None:
    """What is shown of each block is so."""
    facts = pool.facts
    facts.check(list(pool.free_ids()), list(pool.idle_ids()))
    for block_id in range(1, pool.num_blocks + 1):
        parent = prefix.parent_of(block_id)
        _ensure(facts.parents[block_id] == parent, f"block {block_id} is shown under another parent")
    for request in requests:
        for index, block_id in enumerate(request.block_ids):
            _ensure(facts.positions[block_id] == index, f"block {block_id} is shown at another position")


def _check_tree(prefix: PrefixCache) -> None:
    """The index of children is what the published keys say, each block once, the newest before the older."""
    tree = prefix.tree
    hanging = {place: list(tree.children(place)) for place in tree.places()}
    expected: dict[Place, set[int]] = {}
    firsts = 0
    for _, entry in prefix.entries():
        expected.setdefault(tree.place(entry.key), set()).add(entry.block_id)
        if entry.key.parent is None:
            firsts += 1
            salt, tokens = tree.split(entry.key)
            _ensure(
                tree.has_salt(entry.tenant, tokens, salt),
                f"block {entry.block_id} is not known as tenant {entry.tenant}'s",
            )
    _ensure(sum(map(len, hanging.values())) == len(prefix), "a block hangs twice or nowhere")
    _ensure({place: set(ids) for place, ids in hanging.items()} == expected, "a block hangs elsewhere")
    _ensure(tree.num_salts() == firsts, "salts are remembered of blocks that are gone")


def _check_ghosts(pool: BlockPool, prefix: PrefixCache, ghosts: Ghosts) -> None:
    """The list has exactly the idle contents as not evicted, in the pool's order, and none in use."""
    ghosts.check()
    entries = list(ghosts.entries())
    idle = [ghost.key for ghost in entries if ghost.cause is None]
    keys = [prefix.key_of(block_id) for block_id in pool.idle_ids()]
    _ensure(idle[::-1] == [key and hash(key.digest) for key in keys], "the list has other idle contents")
    listed = {ghost.key for ghost in entries} - set(idle)
    _ensure(listed.isdisjoint(hash(digest) for digest, _ in prefix.entries()), "a content in use is listed")
    _ensure(
        all((ghost.zone <= ACTUAL_SIZE) == (ghost.cause is None) for ghost in entries),
        "a pool of the size it has does not have what it has",
    )


def _check_table(request: Request, block_size: int) -> None:
    room = len(request.block_ids) * block_size - request.computed
    if request.status is not Status.RUNNING:
        _ensure(not request.block_ids and request.copy_source is None, f"{request} holds blocks")
    elif request.started or room >= 0:
        _ensure(0 <= room < block_size, f"{request}: the page table does not fit")
        _ensure(request.copy_source is None, f"{request} runs and still waits for a copy")
    else:  # forked, and not run yet
        shared, copied = split_for_fork(request.prompt_len, block_size)
        _ensure(len(request.block_ids) == shared, f"{request}: forked with the wrong blocks")
        _ensure((request.copy_source is not None) == (copied > 0), f"{request}: forked without its tail")


def _check_published(request: Request, prefix: PrefixCache) -> None:
    for index, block_id in enumerate(request.block_ids):
        key = prefix.key_of(block_id)
        if key is not None:
            _ensure(key.content == prefix.content(request, index), f"{request}: block {block_id} is misfiled")


def _check_sharing(requests: Sequence[Request], block_size: int) -> None:
    place: dict[int, int] = {}
    tails: set[int] = set()
    for request in requests:
        for index, block_id in enumerate(request.block_ids):
            _ensure(place.setdefault(block_id, index) == index, f"block {block_id} has two places")
            if (index + 1) * block_size > request.computed:
                _ensure(block_id not in tails, f"block {block_id} is the tail of two requests")
                tails.add(block_id)
    for request in requests:
        for index, block_id in enumerate(request.block_ids):
            full = (index + 1) * block_size <= request.computed
            _ensure(not full or block_id not in tails, f"block {block_id} is shared and still written")
