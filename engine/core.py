"""The engine: requests in, tokens out, one step at a time. It knows no text, no tensors and no threads.

    schedule -> execute -> update

One step ahead, the step that is executed and the one that is seen are not the same:

    steps_ahead 1:   schedule 1 | execute 1 | update 1 | schedule 2 | execute 2 | update 2 | ...
    steps_ahead 2:   schedule 1 | execute 1 | schedule 2 | execute 2 | update 1 | schedule 3 | ...
                                  '- the device computes -----------------'

A step under a grammar is forwarded as early as any, and sampled once the tokens before it were seen:

    steps_ahead 1:   ... | update 1 | schedule 2 | forward 2 | masks 2 | sample 2 | update 2 | ...
    steps_ahead 2:   ... | schedule 2 | forward 2 | update 1 | masks 2 | sample 2 | schedule 3 | ...
                                        '- the device computes ------------------------------
"""

from __future__ import annotations

import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.grammar import Grammar, Grammars, Matcher
from engine.kv.manager import KVManager
from engine.plan import Executor, StepHandle, StepPlan, TokenMasks
from engine.request import Request
from engine.sched.limits import RequestLimits
from engine.sched.scheduler import Scheduler
from engine.sched.show import Showcase
from engine.sched.stopping import StopRules
from engine.types import EngineSnapshot, SamplingParams, TokenOutput, token_array
from engine.views import DEFAULT_SCOPE, BlockDetail, CachePage, CacheReport, CacheScope, PoolFrame

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class EngineCore:
    """A scheduler, its KV cache and an executor, driven by one thread.

    Args:
        executor: runs plans in order; a fake one needs no device.
        clock: seconds from any moment on, never backwards.
        grammars: compiles what text must be; without it requests with a grammar are refused.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
        grammars: Grammars | None = None,
    ) -> None:
        model, limits = config.model, config.scheduler
        self.kv = KVManager(config.cache)
        self.grammars = grammars
        self._limits = RequestLimits(
            model.vocab_size,
            model.max_model_len,
            limits.max_num_seqs,
            self.kv.capacity_tokens,
            model.embeddings,
        )
        self.scheduler = Scheduler(
            limits,
            self.kv,
            self._limits,
            StopRules(model.eos_token_ids),
            clock=clock,
        )
        self._token_ids = np.array(range(model.vocab_size), dtype=object)
        self._showcase = Showcase(self.kv)
        self._executor = executor
        self._random = random.SystemRandom() if model.seed is None else random.Random(model.seed)
        self._steps_ahead = limits.steps_ahead
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        scope: CacheScope = DEFAULT_SCOPE,
        explain: bool = False,
    ) -> None:
        """Queues a request with `params.n` choices.

        Args:
            scope: requests share cached prefixes only with requests of the same salt.
            explain: the first output of each choice is to say what was reused, and why not more.

        Raises:
            RequestError: it can never run; nothing was changed.
            Overloaded: the queue is full.
        """
        prompt = _token_ids(prompt_ids)
        self._limits.check_prompt(prompt)
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        # Not `tolist`, which makes a number of each: 25 ms and 20 MB for 650,000 tokens.
        token_ids = self._token_ids[np.asarray(prompt)].tolist()
        leader, *followers = (
            Request(
                request_id,
                token_ids,
                params,
                index=i,
                seed=choice_seed(seed, i),
                scope=scope,
                explain=explain,
                matcher=self._matcher(params.grammar),
            )
            for i in range(params.n)
        )
        leader.followers = followers
        self.scheduler.add(leader)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends one choice, or all; the next `step` returns their last outputs. Unknown ids are ignored."""
        self.scheduler.abort(request_id, index)

    def fail(self, request_id: str | None, message: str) -> None:
        """Ends one request, or all of them, with an error; the next `step` returns the outputs."""
        self.scheduler.fail(request_id, message)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight) or self.kv.num_leaving > 0

    def step(self) -> list[TokenOutput]:
        """Launches the next step and sees the oldest one's tokens, once enough are in flight.

        Raises:
            whatever the executor raises (out of memory, a lost device). Before that, every running request
            goes back to the queue and steps in flight are forgotten: the state is consistent, no request
            is lost, and outputs not yet returned come with the next call. Whether to go on, to `fail`
            requests or to end the process is the caller's decision.
            AssertionError: the engine's books do not add up. Nothing it says from now on can be trusted.
        """
        if not self.scheduler.running:
            self._check_idle()
        began_s = self.scheduler.tally.tick()
        plan = None
        try:
            plan = self.scheduler.schedule()
            if plan is not None:
                self._execute(plan)
            if self._in_flight and (plan is None or len(self._in_flight) >= self._steps_ahead):
                self._see_oldest()
            outputs = self.scheduler.take_outputs()
        except BaseException:
            self._in_flight.clear()
            self.scheduler.restart()
            raise
        finally:
            self.scheduler.tally.stepped(began_s, worked=plan is not None)
        return outputs

    def prepare(self) -> bool:
        """Gets ready for later steps, in a moment without work. Whether there was anything to do."""
        return self._executor.prepare()

    def snapshot(self) -> EngineSnapshot:
        """The state between two steps. Cheap: counts that are kept anyway."""
        scheduler, tally, pool, counts = self.scheduler, self.scheduler.tally, self.kv.pool, self.kv.counts
        facts = pool.facts
        return EngineSnapshot(
            steps=scheduler.steps,
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            blocks_total=pool.num_blocks,
            blocks_in_use=pool.num_in_use,
            blocks_shared=pool.num_shared,
            blocks_cached=pool.num_idle,
            blocks_free=pool.num_free,
            tokens_held=self.kv.tokens_held(scheduler.running),
            cached_tokens=pool.num_idle * self.kv.block_size,
            allocated_blocks=facts.allocated,
            reused_blocks=facts.reused,
            evicted_blocks=dict(counts.evicted),
            prefix_queries=counts.prefix_queries,
            prefix_hits=counts.prefix_hits,
            prefix_query_tokens=counts.prefix_query_tokens,
            prefix_hit_tokens=counts.prefix_hit_tokens,
            misses=dict(counts.misses),
            miss_tokens=dict(counts.miss_tokens),
            whatif_hit_tokens=dict(counts.whatif_hit_tokens),
            ghosts=self.kv.num_ghosts,
            preemptions=tally.preemptions,
            recomputed_tokens=tally.recomputed_tokens,
            prompt_tokens=tally.prompt_tokens,
            generated_tokens=tally.generated_tokens,
            step_runs=dict(tally.runs),
            busy_s=tally.busy_s,
            requests_finished=dict(tally.finished),
            histograms={
                **tally.histograms(),
                "hit_ratio": counts.hit_ratio.data(),
                "block_age_s": facts.age_s.data(),
                "block_idle_s": facts.idle_s.data(),
                "block_reuse_gap_s": facts.reuse_gap_s.data(),
            },
            tenants=tally.tenants(scheduler.running, facts),
        )

    # ---- questions about the cache, between two steps

    def probe(self, prompt_ids: Sequence[int], scope: CacheScope = DEFAULT_SCOPE) -> CacheReport:
        """What of a prompt would be reused now. Changes nothing, counts nothing."""
        self.scheduler.tick()
        return self.kv.probe(_token_ids(prompt_ids), scope)

    def cache_page(self, first_block: int = 1, limit: int = 1000, state: str = "") -> CachePage:
        """Some blocks in the order of their ids. Raises InvalidRequest: there is no such state."""
        self.scheduler.tick()
        return self._showcase.page(self.scheduler.running, first_block, limit, state)

    def cache_block(self, block_id: int) -> BlockDetail | None:
        """One block and its tokens; None where the pool has no such block."""
        self.scheduler.tick()
        return self._showcase.block(self.scheduler.running, block_id)

    def reset_prefix_cache(self) -> int:
        """Forgets all cached prefixes; running requests are not disturbed. Returns the blocks emptied."""
        self.scheduler.tick()
        emptied = self.kv.pool.num_idle
        self.kv.reset_prefix_cache()
        return emptied

    def watch(self, on: bool) -> None:
        """From now on, or no longer, remembers which blocks change, for `frame`."""
        self.kv.pool.facts.dirty = set() if on else None

    @property
    def pool_changed(self) -> bool:
        """Whether blocks changed since the last frame."""
        return bool(self.kv.pool.facts.dirty)

    def frame(self, full: bool) -> PoolFrame:
        """All blocks, or those that changed since the frame before; and what the requests do."""
        self.scheduler.tick()
        return self.kv.pool.facts.frame(full, *self.scheduler.lanes())

    def _execute(self, plan: StepPlan) -> None:
        self._executor.forward(plan)
        masks = self._masks(plan) if plan.constrained else None
        self._in_flight.append((plan, self._executor.sample(plan, masks)))

    def _masks(self, plan: StepPlan) -> TokenMasks | None:
        """Made once all tokens before the step were seen, while the device computes it."""
        if self.grammars is None:
            raise AssertionError(f"step {plan.step} is under a grammar, and there are none")
        while self._in_flight:
            self._see_oldest()
        return self.scheduler.masks(plan, self.grammars)

    def _see_oldest(self) -> None:
        plan, handle = self._in_flight.popleft()
        self.scheduler.update(plan, handle.result())

    def _matcher(self, grammar: Grammar | None) -> Matcher | None:
        if grammar is None:
            return None
        if self.grammars is None:
            raise InvalidRequest("This engine has no grammars.", "grammar")
        return self.grammars.start(grammar)

    def _check_idle(self) -> None:
        """What costs nothing is checked whenever nothing runs, before anything changes."""
        if self.kv.pool.num_in_use and not self.kv.num_leaving:
            raise AssertionError(f"nothing runs, and {self.kv.pool.num_in_use} KV blocks are still in use")


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: the request's own for the first, well-mixed ones for the others.

    The others are SplitMix64's outputs, as a signed 64-bit integer, with seed and index as its state.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    if index == 0:
        return seed
    z = (seed + index * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def _token_ids(prompt_ids: Sequence[int]) -> array[int]:
    """Plain unsigned 32-bit integers, or an error that names the prompt."""
    try:
        return token_array(prompt_ids)
    except (TypeError, OverflowError):
        raise InvalidRequest("The prompt must be a list of token ids.", "prompt") from None
