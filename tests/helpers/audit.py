"""The conservation law of the KV cache, stated once. Tests check it after each step; production looks
only whether blocks are left in use when nothing runs (`EngineCore.step`): the whole law takes too long.

It counts everything anew from the requests' page tables and compares; it changes nothing, and knows the
inside of all that it audits. What does not add up is an AssertionError that names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from engine.core import EngineCore
from engine.kv.block_pool import PADDING_BLOCK, BlockPool
from engine.kv.ghosts import _CAUSES, _RING, _ZONE, _ZONE_BITS, Ghosts
from engine.kv.manager import KVManager
from engine.kv.page_table import split_for_fork
from engine.kv.prefix import PrefixCache
from engine.kv.tree import Place
from engine.request import Request, Status
from engine.sched.roster import Roster
from engine.views import WHATIF_SIZES, EvictionCause

ACTUAL_SIZE = WHATIF_SIZES.index(1.0)


def check_core(core: EngineCore) -> None:
    """All blocks, and the rows and places of all live choices."""
    choices = list(core.scheduler._ledger.all_choices())
    check_kv(core.kv, choices)
    _check_roster(core.scheduler.roster, core.scheduler._config.max_num_seqs, choices)


def check_kv(kv: KVManager, requests: Iterable[Request]) -> None:
    """Pool, prefix cache, page tables and memory of the past. `requests`: all that live."""
    pool, prefix, requests = kv.pool, kv.prefix, list(requests)
    holders = Counter(block_id for request in requests for block_id in _held(request))
    holders.update(block_id for leaving in kv._leaving for block_id in leaving.block_ids)
    _check_pool(pool, holders)
    _check_map(pool, prefix)
    _check_shown(pool, prefix, requests)
    _check_tree(prefix)
    _check_listed(pool, prefix, kv.ghosts)
    for request in requests:
        _check_table(request, kv.block_size)
        _check_published(request, prefix)
    _check_sharing(requests, kv.block_size)


def _ensure(law: bool, broken: str) -> None:
    if not law:
        raise AssertionError(broken)


def _held(request: Request) -> Iterator[int]:
    yield from request.block_ids
    if request.copy_source is not None:
        yield request.copy_source


def _check_pool(pool: BlockPool, holders: Counter[int]) -> None:
    free, idle = pool._free, list(pool.idle_ids())
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
    published = {entry.block_id for entry in prefix._entries.values()}
    _ensure(len(published) == len(prefix), "two digests lead to one block")
    for digest, entry in prefix._entries.items():
        _ensure(entry.key.digest == digest, f"block {entry.block_id} is filed under another digest")
        _ensure(prefix.key_of(entry.block_id) is entry.key, f"block {entry.block_id} has another key")
    kept = {block_id for block_id in range(1, pool.num_blocks + 1) if pool.is_kept(block_id)}
    _ensure(kept == published, "the pool keeps other blocks than the prefix cache knows")


def check_facts(pool: BlockPool) -> None:
    """The rows of blocks that nobody uses, and what is counted by tenant."""
    facts = pool.facts
    in_use, cached = [0] * len(facts.in_use), [0] * len(facts.cached)
    free, idle = {PADDING_BLOCK, *pool._free}, set(pool.idle_ids())
    for block_id, tenant in enumerate(facts.tenants):
        hangs = facts.parents[block_id] > 0
        if block_id in free:
            row = (facts.owners, facts.tenants, facts.positions, facts.taken_ds, facts.idle_ds)
            _ensure(not any(column[block_id] for column in row), f"free block {block_id} is somebody's")
        elif block_id in idle:
            cached[tenant] += 1
        else:
            in_use[tenant] += 1
            _ensure(facts.idle_ds[block_id] == 0, f"block {block_id} is not idle")
        _ensure(not hangs or facts.kept[block_id] == 1, f"block {block_id} has a parent unpublished")
    _ensure((in_use, cached) == (facts.in_use, facts.cached), "the tenants' blocks are miscounted")


def _check_shown(pool: BlockPool, prefix: PrefixCache, requests: Sequence[Request]) -> None:
    """What is shown of each block is so."""
    check_facts(pool)
    facts = pool.facts
    for block_id in range(1, pool.num_blocks + 1):
        parent = prefix.parent_of(block_id)
        _ensure(facts.parents[block_id] == parent, f"block {block_id} is shown under another parent")
    for request in requests:
        for index, block_id in enumerate(request.block_ids):
            _ensure(facts.positions[block_id] == index, f"block {block_id} is shown at another position")


def _check_tree(prefix: PrefixCache) -> None:
    """The index of children is what the published keys say, each block once, the newest before the older."""
    tree = prefix.tree
    hanging = {place: list(tree.children(place)) for place in tree._newest}
    expected: dict[Place, set[int]] = {}
    firsts = 0
    for entry in prefix._entries.values():
        expected.setdefault(tree.place(entry.key), set()).add(entry.block_id)
        if entry.key.parent is None:
            firsts += 1
            salt, tokens = tree.split(entry.key)
            _ensure(
                salt in tree._salts.get((entry.tenant, tokens), ()),
                f"block {entry.block_id} is not known as tenant {entry.tenant}'s",
            )
    _ensure(sum(map(len, hanging.values())) == len(prefix), "a block hangs twice or nowhere")
    _ensure({place: set(ids) for place, ids in hanging.items()} == expected, "a block hangs elsewhere")
    _ensure(sum(map(len, tree._salts.values())) == firsts, "salts are remembered of blocks that are gone")


class Ghost(NamedTuple):
    """One content that nobody uses. `zone`: the smallest size that has it, as in `Ghosts.zones`."""

    key: int
    zone: int
    cause: EvictionCause | None


def list_ghosts(ghosts: Ghosts) -> list[Ghost]:
    """All of them, the last used first."""
    found, slot = [], ghosts._older[_RING]
    while slot:
        if slot >= ghosts._first:
            state = ghosts._state[slot]
            found.append(Ghost(ghosts._keys[slot], state & _ZONE, _CAUSES[state >> _ZONE_BITS]))
        slot = ghosts._older[slot]
    return found


def check_ghosts(ghosts: Ghosts) -> None:
    """Ring, marks, counts and table agree with each other."""
    counts, zone, before, slot = [0] * (ghosts.nowhere + 1), 0, _RING, ghosts._older[_RING]
    while slot:
        _ensure(ghosts._newer[slot] == before, "the ring of ghosts is broken")
        if slot < ghosts._first:
            _ensure(slot == zone + 1, "the marks are out of order")
            zone += 1
        else:
            _ensure(ghosts._state[slot] & _ZONE == zone, "a ghost is in another zone than it says")
            _ensure(ghosts._find(ghosts._keys[slot]) == slot, "a ghost is not found")
            counts[zone] += 1
        before, slot = slot, ghosts._older[slot]
    _ensure(zone == ghosts.nowhere and ghosts._newer[_RING] == before, "a mark is lost")
    _ensure(counts == ghosts._in_zone and sum(counts) == len(ghosts), "the counts of ghosts are wrong")
    _ensure(len(ghosts) <= ghosts.limit, "there are too many ghosts")
    _ensure(sum(map(bool, ghosts._table)) == len(ghosts), "the table has other entries than the ring")


def _check_listed(pool: BlockPool, prefix: PrefixCache, ghosts: Ghosts) -> None:
    """The list has exactly the idle contents as not evicted, in the pool's order, and none in use."""
    check_ghosts(ghosts)
    entries = list_ghosts(ghosts)
    idle = [ghost.key for ghost in entries if ghost.cause is None]
    keys = [prefix.key_of(block_id) for block_id in pool.idle_ids()]
    _ensure(idle[::-1] == [key and hash(key.digest) for key in keys], "the list has other idle contents")
    listed = {ghost.key for ghost in entries} - set(idle)
    _ensure(listed.isdisjoint(map(hash, prefix._entries)), "a content in use is listed")
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
            [content] = prefix._contents(request, index, index + 1)
            _ensure(key.content == content, f"{request}: block {block_id} is misfiled")


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


def _check_roster(roster: Roster, num_rows: int, choices: Sequence[Request]) -> None:
    rows = sorted([*roster._free_rows, *(choice.row for choice in choices if choice.row >= 0)])
    _ensure(rows == list(range(num_rows)), f"rows: each must be free or used once, found {rows}")
    behind = [follower for choice in choices for follower in choice.followers]
    placed = [*roster.running, *roster.waiting, *behind]
    _ensure(
        len(placed) == len(choices) and set(placed) == set(choices),
        "a live choice is nowhere, or twice, or a finished one still has a place",
    )
