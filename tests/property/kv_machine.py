"""Hypothesis drives a KVManager through random lives of requests, next to the naive model."""

from __future__ import annotations

from itertools import islice, product

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import CacheConfig
from engine.kv.manager import KVManager
from engine.kv.page_table import blocks_for, split_for_fork
from engine.kv.prefix import sha256_digest
from engine.request import Request, Status
from engine.types import SamplingParams
from engine.views import CacheReport, CacheScope, EvictionCause, MissReason
from tests.helpers.audit import check_kv, list_ghosts
from tests.property.naive_kv import NaiveKV
from tests.property.runs import steps_taken

GREEDY = SamplingParams()
MAX_LIVE = 6
# One draw per rule: drawing is what these tests spend most of their time on.
PROMPTS = [list(prompt) for length in range(1, 10) for prompt in islice(product((2, 3), repeat=length), 12)]
SCOPES = [CacheScope("ann"), CacheScope("ann", b"s"), CacheScope("bob", b"s")]
arrivals = st.sampled_from([(prompt, scope) for scope in SCOPES for prompt in PROMPTS])
picks = st.integers(0, 59)
growths = st.integers(0, 60 * 9 * 2 - 1)


questions = st.integers(0, 97 * 3 * 2 * 6 - 1)


def decode(growth: int) -> tuple[int, int, int]:
    """One drawn number -> (which request, how many tokens, which token)."""
    growth, token = divmod(growth, 2)
    growth, chunk = divmod(growth, 9)
    return growth, chunk + 1, token + 2


class KVMachine(RuleBasedStateMachine):
    """Requests arrive, start from a hit, grow, fork, break and leave, in any order."""

    digest = staticmethod(sha256_digest)
    exact = True

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Request] = []
        self.arrivals = 0
        self.make(1, 4, 8)

    @initialize(
        block_size=st.integers(1, 4), num_blocks=st.integers(2, 14), pools=st.sampled_from([8, 1, 2, 1])
    )
    def make(self, block_size: int, num_blocks: int, pools: int) -> None:
        """`pools`: how many pools' worth of contents are remembered."""
        self.kv = KVManager(CacheConfig(block_size, num_blocks, 1, True, "float32"), self.digest)
        self.kv.ghosts.limit = pools * self.kv.pool.num_blocks
        self.naive = NaiveKV(self.kv, exact=self.exact)

    # ---- which requests a rule may pick

    def waiting(self) -> list[Request]:
        return [r for r in self.live if r.status is Status.WAITING]

    def started(self) -> list[Request]:
        return [r for r in self.live if r.started]

    def forked(self) -> list[Request]:
        return [r for r in self.live if r.status is Status.RUNNING and not r.started]

    # ---- rules

    @precondition(lambda self: len(self.live) < MAX_LIVE)
    @rule(arrival=arrivals)
    def arrive(self, arrival: tuple[list[int], CacheScope]) -> None:
        steps_taken[type(self).__name__] += 1
        self.arrivals += 1
        prompt, scope = arrival
        self.live.append(Request(f"r{self.arrivals}", prompt, GREEDY, scope=scope, explain=True))

    @precondition(lambda self: self.waiting())
    @rule(growth=growths)
    def start(self, growth: int) -> None:
        """Match, adopt, reserve a first stretch; where there is no room, let go again."""
        steps_taken[type(self).__name__] += 1
        pick, chunk, _ = decode(growth)
        request = self.waiting()[pick % len(self.waiting())]
        expected = self.naive.hit_blocks(request)
        assert self.kv.prepare(request)
        hit = self.kv.match(request)
        if self.exact:
            assert list(hit.block_ids) == expected
        assert list(hit.block_ids) == expected[: len(hit.block_ids)], "a hit on other content"
        assert hit.tokens == len(hit.block_ids) * self.naive.size < len(request.token_ids)
        assert hit.idle_blocks == len(set(hit.block_ids) & set(self.naive.idle))
        if request.report is None:
            request.report = self.kv.account(request, hit)
            self.judge(request.report, request.token_ids, request.scope)
            counts = self.kv.counts
            assert counts.whatif_hit_tokens["1"] == counts.prefix_hit_tokens or not self.exact
        self.kv.adopt(request, hit)
        self.naive.shared(list(hit.block_ids))
        request.status, request.started = Status.RUNNING, True
        if not self.advance(request, chunk):
            self.leave(request)
            self.live.append(request)

    @precondition(lambda self: self.started())
    @rule(growth=growths)
    def grow(self, growth: int) -> None:
        steps_taken[type(self).__name__] += 1
        pick, chunk, token = decode(growth)
        self.extend(self.started()[pick % len(self.started())], chunk, token)

    @precondition(lambda self: self.forkable() and len(self.live) < MAX_LIVE)
    @rule(pick=picks)
    def fork(self, pick: int) -> None:
        steps_taken[type(self).__name__] += 1
        leader = self.forkable()[pick % len(self.forkable())]
        self.arrivals += 1
        prompt = leader.token_ids[: leader.prompt_len]
        follower = Request(f"r{self.arrivals}", prompt, GREEDY, scope=leader.scope)
        self.kv.fork(leader, follower)
        split = split_for_fork(leader.prompt_len, self.naive.size)
        tail = leader.block_ids[split.shared_blocks : split.shared_blocks + 1] if split.copied_tokens else []
        assert follower.block_ids == leader.block_ids[: split.shared_blocks]
        assert ([] if follower.copy_source is None else [follower.copy_source]) == tail
        self.naive.shared(leader.block_ids[: split.shared_blocks] + tail)
        follower.status = Status.RUNNING
        self.live.append(follower)

    @precondition(lambda self: self.forked())
    @rule(pick=picks)
    def run_follower(self, pick: int) -> None:
        """The last prompt token again, into a block of its own."""
        steps_taken[type(self).__name__] += 1
        follower = self.forked()[pick % len(self.forked())]
        source = follower.copy_source
        lone = source is not None and self.naive.held.count(source) == 1
        table = list(follower.block_ids)
        new = self.kv.reserve(follower, follower.prompt_len)
        if lone:
            assert source is not None and new == ()
            assert follower.block_ids == [*table, source]
            self.naive.lose(source, EvictionCause.RECLAIMED)
        elif not self.naive.has_room(1):
            assert new is None and follower.block_ids == table and follower.copy_source == source
            return
        else:
            assert new is not None and follower.block_ids == [*table, *new]
            self.naive.took(new)
        pair = self.kv.take_copy(follower)
        if pair is not None:
            assert pair == (source, new[0] if new else None)
            self.naive.copy(*pair)
            self.naive.dropped([pair[0]])
        follower.started = True
        self.naive.compute(follower, follower.computed, follower.prompt_len)
        follower.computed = follower.prompt_len

    @precondition(lambda self: self.forked())
    @rule(pick=picks)
    def orphan(self, pick: int) -> None:
        """All others that hold a follower's tail fill it, publish it, and leave before it runs."""
        steps_taken[type(self).__name__] += 1
        follower = self.forked()[pick % len(self.forked())]
        if (source := follower.copy_source) is not None:
            for other in [r for r in self.live if r is not follower]:
                if source in other.block_ids:
                    for _ in range(pick % 8):
                        self.extend(other, 1, 2)
                if source in (*other.block_ids, other.copy_source):
                    self.leave(other)

    @precondition(lambda self: self.live)
    @rule(pick=picks)
    def finish(self, pick: int) -> None:
        steps_taken[type(self).__name__] += 1
        self.leave(self.live[pick % len(self.live)])

    @precondition(lambda self: self.naive.published or self.naive.lost)
    @rule(question=questions)
    def probe(self, question: int) -> None:
        """Asks about something that is or was cached, about more than that, or about something like it."""
        steps_taken[type(self).__name__] += 1
        question, pick = divmod(question, 97)
        question, scope = divmod(question, len(SCOPES))
        question, lost = divmod(question, 2)
        published, gone = [*self.naive.published], [*self.naive.lost]
        texts = (gone or published) if lost else (published or gone)
        tokens = [*texts[pick % len(texts)][1]]
        if question % 3 == 1:
            tokens += [2, 3]
        elif question % 3 == 2:
            tokens[question % len(tokens)] ^= 1
        before = list_ghosts(self.kv.ghosts), dict(self.kv.counts.misses)
        report = self.kv.probe(tokens, SCOPES[scope])
        assert before == (list_ghosts(self.kv.ghosts), self.kv.counts.misses), "a probe leaves no trace"
        self.judge(report, tokens, SCOPES[scope])

    @precondition(lambda self: self.naive.published)
    @rule(pick=st.integers(0, 4))
    def reset(self, pick: int) -> None:
        steps_taken[type(self).__name__] += 1
        if pick == 0:
            self.kv.reset_prefix_cache()
            self.naive.reset()

    # ---- invariants

    @invariant()
    def time_passes(self) -> None:
        self.naive.now_s += 1
        self.kv.tick(self.naive.now_s)

    @invariant()
    def law_holds(self) -> None:
        check_kv(self.kv, self.live)
        self.naive.compare()
        for request in self.started():
            self.naive.read_back(request)

    def teardown(self) -> None:
        for request in list(self.live):
            self.leave(request)
        self.law_holds()
        assert self.kv.pool.num_in_use == 0

    # ---- what rules share

    def forkable(self) -> list[Request]:
        return [r for r in self.started() if r.computed >= r.prompt_len]

    def extend(self, request: Request, chunk: int, token: int) -> None:
        """A step of a request: a token is sampled where all is computed, and up to `chunk` are computed."""
        if request.computed == len(request.token_ids):
            confirmed_before = request.confirmed
            request.token_ids.append(token)
            request.confirmed = request.computed
            self.kv.commit(request)
            self.naive.publish(request, confirmed_before)
        self.advance(request, chunk)

    def advance(self, request: Request, chunk: int) -> bool:
        """Computes up to `chunk` more tokens; False where there was no room, which must leave no trace."""
        end = min(request.computed + chunk, len(request.token_ids))
        table = list(request.block_ids)
        missing = blocks_for(end, self.naive.size) - len(table)
        new = self.kv.reserve(request, end)
        if not self.naive.has_room(missing):
            assert new is None and request.block_ids == table
            return False
        assert new is not None and len(new) == missing and request.block_ids == [*table, *new]
        self.naive.took(new)
        self.naive.compute(request, request.computed, end)
        request.computed = end
        return True

    def judge(self, report: CacheReport, tokens: list[int], scope: CacheScope) -> None:
        """A report is what the naive model says; an eviction long ago may be forgotten, if that is said."""
        if not self.exact:
            return
        expected = self.naive.explain(tokens, scope, self.live, remembers=True)
        if report != expected and expected.reason is MissReason.EVICTED:
            end = expected.at_token + self.naive.size
            assert not self.naive.must_remember(tokens[:end], scope.salt), "forgotten too early"
            assert self.kv.ghosts.overflowed
            expected = self.naive.explain(tokens, scope, self.live, remembers=False)
        assert report == expected

    def leave(self, request: Request) -> None:
        held = [] if request.copy_source is None else [request.copy_source]
        held += reversed(request.block_ids)
        self.kv.release(request)
        self.naive.dropped(held)
        assert request.block_ids == [] and request.copy_source is None
        self.live.remove(request)
        request.status, request.started = Status.WAITING, False
        request.computed = request.confirmed = 0


class WeakHashKVMachine(KVMachine):
    """The same with a hash of four values: it may miss, it must never serve other content."""

    digest = staticmethod(lambda data: bytes([sum(data) % 4]))
    exact = False


class ConstantHashKVMachine(KVMachine):
    """Every hash is forged."""

    digest = staticmethod(lambda data: b"same")
    exact = False
