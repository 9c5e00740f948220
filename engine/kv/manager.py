"""The KV cache's only face: page tables, sharing and the prefix cache. It knows no steps and no memory.

A request's blocks:

    0                published              confirmed         computed      len(block_ids) * block_size
    |-------------------|----------------------|-----------------|---------------------|
     in the prefix cache  full ones: `commit`   steps in flight   room of the tail block
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engine.config import CacheConfig
from engine.kv.block_pool import BlockPool
from engine.kv.counts import CacheCounts
from engine.kv.explain import Explainer, whatif_hits
from engine.kv.ghosts import Ghosts
from engine.kv.leaving import Leaving
from engine.kv.page_table import blocks_for, split_for_fork
from engine.kv.prefix import Digest, PrefixCache, Published, sha256_digest
from engine.request import Request
from engine.types import SamplingParams
from engine.views import CacheReport, CacheScope, EvictionCause, MissReason


class PrefixHit(NamedTuple):
    """What `match` found beyond what the request holds. Valid until the next call that takes or releases
    blocks.

    Attributes:
        tokens: in all that it will hold.
        idle_blocks: how many of them nobody uses: adopting these makes room scarcer.
    """

    block_ids: tuple[int, ...]
    tokens: int
    idle_blocks: int


# Hashed, adopted, published or given back in one step, in 3 to 5 us each: more than most contexts have. The
# rest of a longer one waits for the next steps, so that others' tokens do not wait for it.
BLOCKS_PER_STEP = 2048
NO_HIT = PrefixHit((), 0, 0)


class KVManager:
    """Gives blocks to requests and takes them back.

    Args:
        digest: the prefix cache's hash; tests pass worse ones.

    Attributes:
        counts: what was looked up, found and evicted.
        ghosts: what was evicted, and what other sizes of pool would have.
        now_s: the time of this step, see `tick`.
        blocks_per_step: see BLOCKS_PER_STEP; tests set it lower.
    """

    def __init__(self, config: CacheConfig, digest: Digest = sha256_digest) -> None:
        self.block_size = config.block_size
        self.prefix_caching = config.prefix_caching
        self.prefix = PrefixCache(config.block_size, digest)
        self.pool = BlockPool(config.num_blocks, on_evict=self._evicted)
        self.counts = CacheCounts()
        self.ghosts = Ghosts(self.pool.num_blocks if config.prefix_caching else 0)
        self.now_s = 0.0
        self.blocks_per_step = self._allowance = BLOCKS_PER_STEP
        self._leaving: deque[Leaving] = deque()
        self._running: dict[Request, None] = {}  # admitted, and may publish more
        self._explainer = Explainer(config.block_size, self.prefix, self.ghosts, self._running.keys())

    def tick(self, now_s: float) -> None:
        """Sets the time, which only ever grows; once per step is often enough. Until the next tick no more
        than `blocks_per_step` are handled of what can wait."""
        self.now_s = now_s
        self.pool.facts.now_ds = int(now_s * 10)
        self._allowance = self.blocks_per_step

    @property
    def is_busy(self) -> bool:
        """Whether what can wait has to wait for the next step."""
        return self._allowance == 0

    @property
    def num_leaving(self) -> int:
        """Requests that have ended and still hold blocks."""
        return len(self._leaving)

    @property
    def capacity_tokens(self) -> int:
        return self.pool.num_blocks * self.block_size

    @property
    def num_ghosts(self) -> int:
        """Evicted contents that are remembered."""
        return len(self.ghosts) - self.pool.num_idle

    def reads_prefix(self, request: Request) -> bool:
        """Prompt logprobs, and some embeddings, need every prompt token computed."""
        pooling = request.params.pooling
        pools_all = pooling is not None and pooling.needs_every_token
        return self.prefix_caching and request.prompt_logprobs is None and not pools_all

    def prepare(self, request: Request) -> bool:
        """Hashes a part of a long prompt, before it is looked up; False where that must wait for a later
        step: there is more to hash, or so much was hashed that looking it up is work enough for one step."""
        full_blocks = len(request.token_ids) // self.block_size if self.prefix_caching else 0
        missing = full_blocks - len(request.block_keys)
        if missing <= 0:
            return True
        granted = self._grant(missing)
        self.prefix.hash_blocks(request, granted)
        return granted == missing and full_blocks <= self.blocks_per_step

    def match(self, request: Request) -> PrefixHit:
        """Looks up the request's tokens. Changes nothing.

        At most all known tokens but one, rounded down to full blocks: something must be left to compute,
        because the last token's logits are needed.
        """
        if not self.reads_prefix(request):
            return NO_HIT
        held = len(request.block_ids)
        found = self.prefix.find(request, held, (len(request.token_ids) - 1) // self.block_size)
        return PrefixHit(tuple(found), (held + len(found)) * self.block_size, self.pool.count_idle(found))

    def is_coming(self, request: Request, hit: PrefixHit) -> bool:
        """Whether it pays to wait for blocks that somebody computes and has not published yet: they are half
        of what the request would compute at least, and will be there before it could have computed them."""
        if not self.reads_prefix(request):
            return False
        known, first = len(request.token_ids), hit.tokens // self.block_size
        end = (known - 1) // self.block_size
        for other in self._running:
            if other.confirmed < other.prompt_len:
                theirs = min(end, other.prompt_len // self.block_size)
                shared = self.prefix.common_blocks(request, other, first, theirs)
                saved = (shared - first) * self.block_size
                if saved and saved >= other.remaining and 2 * saved >= known - hit.tokens:
                    return True
        return False

    def account(self, request: Request, hit: PrefixHit) -> CacheReport:
        """Explains and counts the hit of a request admitted for the first time, before it is adopted.

        Exact in what it counts; where it diverged is told exactly to requests that `explain` only.
        """
        report = self.explain(request, hit)
        self.counts.count(report)
        if self.reads_prefix(request):
            size = self.block_size
            blocks = whatif_hits(
                request, (request.prompt_len - 1) // size, len(hit.block_ids), self.prefix, self.ghosts
            )
            self.counts.count_whatif([count * size for count in blocks])
        return report

    def probe(self, token_ids: Sequence[int], scope: CacheScope) -> CacheReport:
        """What a prompt would reuse now, and why not more. Counts nothing, changes nothing."""
        request = Request("", token_ids, SamplingParams(), scope=scope, explain=True)
        return self.explain(request, self.match(request))

    def explain(self, request: Request, hit: PrefixHit) -> CacheReport:
        """What `match` just found of a request that does not run yet, and why not more."""
        if not self.prefix_caching:
            return CacheReport(request.prompt_len, 0, MissReason.CACHING_OFF, 0)
        if not self.reads_prefix(request):
            reason = MissReason.PROMPT_LOGPROBS if request.params.pooling is None else MissReason.POOLING
            return CacheReport(request.prompt_len, 0, reason, 0)
        return self._explainer.report(request, len(hit.block_ids), self.now_s)

    def adopt(self, request: Request, hit: PrefixHit) -> bool:
        """Puts the blocks of a hit into the page table of a request for which nothing was computed yet.

        Returns:
            Whether those were all. Else the request is to be matched again and to adopt the rest in the
            next step; until then nobody keeps that for it.
        """
        adopted = hit.block_ids[: self._grant(len(hit.block_ids))]
        woken = self.pool.share(adopted)
        self.ghosts.used(self.prefix.digests_of(woken))
        self.ghosts.taken(self.pool.num_in_use)
        self._running[request] = None
        request.block_ids += adopted
        request.num_published = len(request.block_ids)
        request.computed = request.confirmed = request.num_published * self.block_size
        return len(adopted) == len(hit.block_ids)

    def reserve(self, request: Request, total_tokens: int) -> tuple[int, ...] | None:
        """Extends the page table to hold `total_tokens`.

        Returns:
            The new blocks, or None where there is no room; then nothing changed.
        """
        missing = blocks_for(total_tokens, self.block_size) - len(request.block_ids)
        if missing <= 0:
            return ()
        while self._leaving and missing > self.pool.num_available:  # scarce: this cannot wait
            self._let_go(missing)
        inherits = request.copy_source is not None and self.pool.ref(request.copy_source) == 1
        if missing - inherits > self.pool.num_available:
            return None
        if inherits:
            self._inherit(request)
        facts = self.pool.facts
        tenant = facts.tenant(request.scope.tenant)
        new = self.pool.take(missing - inherits, request.number, tenant, len(request.block_ids))
        request.block_ids += new
        self.ghosts.taken(self.pool.num_in_use)
        return tuple(new)

    def commit(self, request: Request) -> None:
        """Publishes the blocks that `confirmed` has filled, as many as this step may."""
        missing = self._publishable(request)
        if missing > 0:
            first = request.num_published
            request.num_published += self._grant(missing)
            self._publish(request, request.block_ids, first, request.num_published)

    def fork(self, leader: Request, follower: Request) -> None:
        """Gives the follower the leader's computed prompt, all but the last token. See `split_for_fork`."""
        split = split_for_fork(leader.prompt_len, self.block_size)
        follower.block_ids = leader.block_ids[: split.shared_blocks]
        self.pool.share(follower.block_ids)
        if split.copied_tokens:
            follower.copy_source = leader.block_ids[split.shared_blocks]
            self.pool.share([follower.copy_source])
        follower.computed = leader.prompt_len - 1
        follower.block_keys = leader.block_keys[: leader.prompt_len // self.block_size]
        self._running[follower] = None

    def take_copy(self, request: Request) -> tuple[int, int] | None:
        """Returns the (source, destination) that the step about to be launched must copy, if any.

        The source's reference ends here: steps run in order, so whoever gets the block next writes to it
        in a later step. Called once per step, after its last `reserve`, so that no source of a step is
        also a destination in it.
        """
        source = request.copy_source
        if source is None:
            return None
        request.copy_source = None
        self._drop([source])
        return source, request.block_ids[split_for_fork(request.prompt_len, self.block_size).shared_blocks]

    def release(self, request: Request) -> None:
        """Takes every block back, once what is left to publish is published: as many as this step may, the
        others by and by. See `Leaving`."""
        if request.copy_source is not None:
            self._drop([request.copy_source])
            request.copy_source = None
        if request.block_ids:
            first = request.num_published
            self._leaving.append(
                Leaving(request, request.block_ids, first, first + self._publishable(request))
            )
        request.block_ids = []
        request.num_published = 0
        self._running.pop(request, None)
        self.settle()

    def settle(self) -> None:
        """Takes back blocks of those that have left, as many as this step may."""
        while self._leaving and (granted := self._grant(self._leaving[0].work)):
            self._let_go(granted)

    def reset_prefix_cache(self) -> None:
        """Forgets all content. Blocks in use stay with their requests, which do not publish them again."""
        for block_id, key in self.prefix.clear().items():
            self.pool.forget(block_id)
            self._lost(key.digest, EvictionCause.RESET)
        self.ghosts.emptied()

    def tokens_held(self, running: Iterable[Request]) -> int:
        """Tokens in the blocks in use, shared ones counted once: full blocks less the tails' empty room."""
        size = self.block_size
        held = self.pool.num_in_use * size
        copiers: dict[int, list[Request]] = {}
        for request in running:
            room = len(request.block_ids) * size - request.computed
            if room > 0:
                held -= room
            elif request.copy_source is not None:
                copiers.setdefault(request.copy_source, []).append(request)
        for block_id, requests in copiers.items():
            # Whose tail it was is gone, and it holds what is still to be copied.
            if self.pool.ref(block_id) == len(requests) and not self.pool.is_kept(block_id):
                held -= (len(requests[0].block_ids) + 1) * size - requests[0].computed
        return held

    def _grant(self, wanted: int) -> int:
        granted = max(min(wanted, self._allowance), 0)
        self._allowance -= granted
        return granted

    def _publishable(self, request: Request) -> int:
        """Blocks that are full, confirmed and not published."""
        return request.confirmed // self.block_size - request.num_published if self.prefix_caching else 0

    def _publish(self, request: Request, block_ids: Sequence[int], first: int, end: int) -> None:
        published = self.prefix.publish(request, block_ids, first, end)
        self.pool.keep(published.block_ids)
        self._join(published)
        self.ghosts.used(self.prefix.digests_of(published.block_ids))

    def _let_go(self, blocks: int) -> None:
        """Handles so many blocks, or fewer, of the request that left first."""
        leaving = self._leaving[0]
        span = leaving.publish_next(blocks)
        if span is not None:
            self._publish(leaving.request, leaving.block_ids, *span)
            return
        self._drop(leaving.drop_next(blocks))
        if not leaving.block_ids:
            self._leaving.popleft()

    def _inherit(self, request: Request) -> None:
        """Nobody else is left to read the tail block: the last one needs no copy of it. This also
        guarantees that a lone request never needs more blocks than its size was checked by."""
        assert request.copy_source is not None
        if self.pool.is_kept(request.copy_source):
            self._forget(request.copy_source, EvictionCause.RECLAIMED)
            self.pool.forget(request.copy_source)
        request.block_ids.append(request.copy_source)
        request.copy_source = None

    def _drop(self, block_ids: Sequence[int]) -> None:
        """Gives references back; the last one of a published block makes its content idle."""
        idled = self.pool.drop(block_ids)
        self.ghosts.released(self.prefix.digests_of(idled))

    def _evicted(self, block_id: int) -> None:
        self._forget(block_id, EvictionCause.CAPACITY)

    def _join(self, published: Published) -> None:
        """Blocks were published; what goes on from them may have been there before."""
        facts = self.pool.facts
        facts.joined(published.block_ids, published.parents)
        for block_id in published.reunited:
            for child in self.prefix.children_of(block_id):
                facts.follows(child, block_id)

    def _forget(self, block_id: int, cause: EvictionCause) -> None:
        for child in self.prefix.children_of(block_id):
            self.pool.facts.follows(child, 0)
        self._lost(self.prefix.forget(block_id).digest, cause)

    def _lost(self, digest: bytes, cause: EvictionCause) -> None:
        self.ghosts.lost(digest, self.now_s, cause)
        self.counts.evicted[cause] += 1
