"""Hypothesis drives an EngineCore with a fake executor: arrivals, aborts and faults at any moment."""

from __future__ import annotations

from itertools import islice, product
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core import EngineCore
from engine.embedding import Pooling, PoolingKind
from engine.errors import NeverFits
from engine.kv.manager import BLOCKS_PER_STEP
from engine.request import Request, Status
from engine.types import EngineSnapshot, SamplingParams
from engine.views import CacheScope
from tests.helpers.audit import check_core
from tests.helpers.fake_executor import FakeExecutor, make_config
from tests.helpers.viewer import Viewer
from tests.property.choices import Choice
from tests.property.runs import steps_taken

MAX_LIVE = 8
MAX_MODEL_LEN = 40
PROMPTS = [list(prompt) for length in range(1, 15) for prompt in islice(product((2, 3), repeat=length), 6)]
STOPS = (5, 15, 25, 35, 45)
SCOPES = [CacheScope("ann"), CacheScope("ann", b"s"), CacheScope("bob", b"s"), CacheScope("bob", b"t")]
picks = st.integers(0, 59)
arrivals = st.tuples(st.sampled_from(PROMPTS), st.sampled_from(SCOPES), st.booleans())
priorities = st.sampled_from([0, 0, -1, 1, 2**31 - 1])
texts = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2, 3]),
    seed=st.integers(0, 2),
    max_tokens=st.sampled_from([None, 0, 1, 2, 5, 8, 12, 16]),
    stop_token_ids=st.sampled_from([(), (), STOPS]),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
    logprobs=st.sampled_from([None, 0]),
    priority=priorities,
)
vectors = st.builds(
    SamplingParams,
    max_tokens=st.just(0),
    seed=st.integers(0, 2),
    priority=priorities,
    pooling=st.builds(Pooling, st.sampled_from(PoolingKind)),
)
params = st.one_of(texts, texts, texts, texts, vectors)
configs = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 8),
        "pool_tokens": st.integers(12, 48),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([1, 2, 3, 4, 6, 9, 24]),
        "steps_ahead": st.integers(1, 2),
        "least_piece": st.sampled_from([1, 1, 2]),
        "prefix_caching": st.sampled_from([True, True, False]),
        "blocks_per_step": st.sampled_from([1, 2, 3, 5, BLOCKS_PER_STEP]),
    }
)


class InjectedFault(Exception):
    """Raised on purpose inside the engine's handling of one request."""


class DeviceFault(Exception):
    """Raised on purpose by the executor."""


def rank(request: Request) -> tuple[int, int]:
    """Who comes first, by what the caller said and when; choices of one request are equal."""
    return request.params.priority, int(request.request_id)


class SchedMachine(RuleBasedStateMachine):
    """Every choice ends once, with the right text, and all blocks come back."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: dict[tuple[str, int], Choice] = {}
        self.arrivals = 0
        self.viewer: Viewer | None = None
        self.make({"block_size": 1, "pool_tokens": 8, "blocks_per_step": 1})

    @initialize(options=configs)
    def make(self, options: dict[str, Any]) -> None:
        num_blocks = 1 + -(-options.pop("pool_tokens") // options["block_size"])
        blocks_per_step = options.pop("blocks_per_step")
        if options.get("max_num_batched_tokens", 64) < options.get("max_num_seqs", 8) + 2:
            options["least_piece"] = 1  # what the configuration refuses
        config = make_config(max_model_len=MAX_MODEL_LEN, num_blocks=num_blocks, **options)
        self.executor = FakeExecutor(config)
        self.now_s = 1000.0
        self.core = EngineCore(config, self.executor, lambda: self.now_s)
        self.core.kv.blocks_per_step = blocks_per_step
        self.max_num_seqs = config.scheduler.max_num_seqs

    # ---- rules

    @precondition(lambda self: len(self.live()) < MAX_LIVE)
    @rule(arrival=arrivals, params=params)
    def add(self, arrival: tuple[list[int], CacheScope, bool], params: SamplingParams) -> None:
        prompt, scope, explain = arrival
        self.arrivals += 1
        request_id = str(self.arrivals)
        room = min(MAX_MODEL_LEN, self.core.kv.capacity_tokens) - len(prompt)
        max_output = room if params.max_tokens is None else params.max_tokens
        if params.n > self.max_num_seqs:
            return
        try:
            self.core.add(request_id, prompt, params, scope, explain)
        except NeverFits:
            assert max_output > room or room < 1, "refused though it fits"
            return
        group = [Choice(prompt, params, index, max_output, explain) for index in range(params.n)]
        for choice in group:
            choice.group = group
            self.choices[request_id, choice.index] = choice

    @precondition(lambda self: self.core.scheduler.running and len(self.live()) < MAX_LIVE)
    @rule(scope=st.sampled_from(SCOPES))
    def rush(self, scope: CacheScope) -> None:
        """A long prompt comes before all that run: its parts are planned behind their single tokens."""
        self.add((PROMPTS[-1], scope, False), SamplingParams(max_tokens=2, priority=-5, seed=0))
        self.step(8)

    @precondition(lambda self: self.core.has_work)
    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @precondition(lambda self: self.live())
    @rule(pick=picks, whole=st.booleans())
    def abort(self, pick: int, whole: bool) -> None:
        request_id, index = self.live()[pick % len(self.live())]
        for choice in self.choices[request_id, index].group if whole else [self.choices[request_id, index]]:
            choice.aborted = True
        self.core.abort(request_id, None if whole else index)
        ended = [r for r in self.requests() if r.request_id == request_id and (whole or r.index == index)]
        assert not ended, "an aborted choice lives on"

    @precondition(lambda self: self.requests())
    @rule(kind=st.integers(0, 7), pick=picks)
    def disturb(self, kind: int, pick: int) -> None:
        """One of the rare things, now and then."""
        target = self.requests()[pick % len(self.requests())]
        if kind == 0:
            self.break_logits(target, ahead=pick % 4)
        elif kind == 1:
            self.break_planning(target)
        elif kind == 2:
            self.break_device(late=pick % 2 == 0)
        elif kind == 3:
            self.core.reset_prefix_cache()
        elif kind == 4:
            self.drain()
        elif kind == 5:
            self.look(pick)

    def look(self, pick: int) -> None:
        """Somebody begins to watch the pool, or the last one goes."""
        self.viewer = Viewer() if pick % 3 else None
        self.core.watch(self.viewer is not None)
        if self.viewer is not None:
            self.viewer.apply(self.core.frame(True))

    def break_logits(self, target: Request, ahead: int) -> None:
        """Some token to come will not be finite."""
        self.executor.broken.add((target.seed, target.known + ahead))

    def break_planning(self, target: Request) -> None:
        """The next look at one request's blocks raises."""
        for choice in self.choices[target.request_id, target.index].group:
            choice.may_fail = True
        reserve = self.core.kv.reserve

        def faulty(request: Request, total_tokens: int) -> tuple[int, ...] | None:
            if request is target:
                raise InjectedFault
            return reserve(request, total_tokens)

        self.core.kv.reserve = faulty  # type: ignore[method-assign]
        self.one_step()
        del self.core.kv.reserve

    def break_device(self, late: bool) -> None:
        """The executor fails as a whole, at launch or when its result is read: nobody may be lost."""
        if late:
            self.executor.fail_next_result = DeviceFault()
        else:
            self.executor.fail_next = DeviceFault()
        for _ in range(40 if self.in_pieces() else 4):
            try:
                self.one_step()
            except DeviceFault:
                assert not self.core.scheduler.running
                assert self.core.kv.pool.num_in_use == 0 or self.core.kv.num_leaving
                return
        self.executor.fail_next = self.executor.fail_next_result = None

    def drain(self) -> None:
        """Bounded progress: at worst requests run one after the other."""
        live = [self.choices[key] for key in self.live()]
        bound = 10 + sum(3 * (len(choice.prompt) + choice.max_output + 5) for choice in live)
        if self.in_pieces():
            bound *= 4
        taken = 0
        while self.core.has_work:
            taken += 1
            assert taken <= bound, f"no end after {taken} steps: {self.requests()}"
            self.one_step()
        assert not self.live(), f"never ended: {self.live()}"
        assert self.core.kv.pool.num_in_use == 0

    # ---- invariants

    @invariant()
    def law_holds(self) -> None:
        check_core(self.core)
        snapshot = self.core.snapshot()
        assert snapshot.blocks_in_use + snapshot.blocks_cached + snapshot.blocks_free == snapshot.blocks_total
        page = self.core.cache_page(limit=snapshot.blocks_total)
        held = sum(view.tokens for view in page.blocks if view.idle_s is None)
        assert snapshot.tokens_held == held or self.core.kv.num_leaving
        assert snapshot.running <= self.max_num_seqs
        assert snapshot.running + snapshot.waiting == len(self.requests())
        waiting = [rank(request) for request in self.core.scheduler.roster.waiting]
        assert waiting == sorted(waiting), "somebody lost his place in the queue"
        self.tally_adds_up(snapshot)
        if self.viewer is not None:
            frame = self.core.frame(False)
            self.viewer.apply(frame)
            self.viewer.expect(self.core.kv.pool)
            assert len(frame.lanes) + frame.lanes_left_out == len(self.requests())

    def tally_adds_up(self, snapshot: EngineSnapshot) -> None:
        """Tenants are all there is, and what is counted twice is counted alike."""
        uses = snapshot.tenants.values()
        assert sum(use.blocks_in_use for use in uses) == snapshot.blocks_in_use
        assert sum(use.blocks_cached for use in uses) == snapshot.blocks_cached
        assert sum(use.running for use in uses) == snapshot.running
        assert sum(use.waiting for use in uses) == snapshot.waiting
        assert sum(use.hit_tokens for use in uses) == snapshot.prefix_hit_tokens
        count = {name: sum(data.counts) for name, data in snapshot.histograms.items()}
        requests = sum(use.requests for use in uses)
        assert requests == count["queue_s"] == sum(snapshot.misses.values())
        assert count["prefill_s"] <= requests
        assert count["hit_ratio"] == snapshot.prefix_queries
        assert count["block_age_s"] == count["block_idle_s"] == snapshot.evicted_blocks["capacity"]
        assert count["block_reuse_gap_s"] == snapshot.reused_blocks
        assert count["step_tokens"] == count["step_sequences"] == snapshot.steps
        heard = [choice for choice in self.choices.values() if choice.token_ids]
        ended = sum(choice.outputs[-1].finish_reason is not None for choice in heard)
        assert count["decode_s"] >= ended
        if not self.core.has_work:
            assert count["decode_s"] == ended
            assert snapshot.generated_tokens == sum(len(choice.token_ids) for choice in heard)

    def teardown(self) -> None:
        self.drain()
        self.law_holds()

    def order_was_kept(self, waiting: list[Request], epochs: dict[Request, int]) -> None:
        """Nobody was admitted before, and nobody preempted after, who comes first by priority and arrival.

        Args:
            waiting, epochs: who waited before the step, and how often each had been preempted.
        """
        still = [rank(request) for request in waiting if request.status is Status.WAITING]
        admitted = [rank(request) for request in waiting if request.status is Status.RUNNING]
        assert not still or not admitted or max(admitted) <= min(still), "somebody was passed in the queue"
        preempted = [rank(request) for request, epoch in epochs.items() if request.preemptions > epoch]
        running = [rank(request) for request in self.core.scheduler.running]
        assert running == sorted(running)
        assert not preempted or not running or max(running) <= min(preempted), "the wrong one was preempted"

    # ---- what rules share

    def in_pieces(self) -> bool:
        """Whether steps may pass with nothing but hashing, looking up and giving back."""
        return self.core.kv.blocks_per_step < BLOCKS_PER_STEP

    def live(self) -> list[tuple[str, int]]:
        return [key for key, choice in self.choices.items() if not choice.ended and not choice.aborted]

    def requests(self) -> list[Request]:
        return list(self.core.scheduler._ledger.all_choices())

    def one_step(self) -> None:
        steps_taken[type(self).__name__] += 1
        running = self.core.scheduler.running
        first = min(running, key=rank, default=None)
        epochs = {request: request.preemptions for request in self.requests()}
        waiting = list(self.core.scheduler.roster.waiting)
        had_work, launched = self.core.has_work, self.executor.steps
        in_flight = len(self.core._in_flight)
        self.now_s += 0.3
        outputs = self.core.step()
        for output in outputs:
            self.choices[output.request_id, output.index].hear(output, self.executor.broken)
        assert first is None or first.preemptions == epochs[first], "the first in order was preempted"
        self.order_was_kept(waiting, epochs)
        if had_work and in_flight == 0 and not outputs and not self.in_pieces():
            assert self.executor.steps > launched, "work, and nothing was done"
        if self.core.scheduler.kv.pool.num_in_use:
            check_core(self.core)
