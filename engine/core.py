"""The engine: requests in, tokens out, one step at a time. It knows no text, no tensors and no threads.

    schedule -> execute -> update

One step ahead, the step that is executed and the one that is seen are not the same:

    steps_ahead 1:   schedule 1 | execute 1 | update 1 | schedule 2 | execute 2 | update 2 | ...
    steps_ahead 2:   schedule 1 | execute 1 | schedule 2 | execute 2 | update 1 | schedule 3 | ...
                                  '- the device computes -----------------'
"""

from __future__ import annotations

import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.kv.manager import KVManager
from engine.plan import Executor, StepHandle, StepPlan
from engine.request import Request
from engine.sched.limits import RequestLimits
from engine.sched.scheduler import Scheduler
from engine.sched.stopping import StopRules
from engine.types import EngineSnapshot, SamplingParams, TokenOutput
from engine.views import DEFAULT_SCOPE, CacheScope, EvictionCause

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class EngineCore:
    """A scheduler, its KV cache and an executor, driven by one thread.

    Args:
        executor: runs plans in order; a fake one needs no device.
        clock: seconds from any moment on, never backwards.
    """

    def __init__(
        self, config: EngineConfig, executor: Executor, clock: Callable[[], float] = time.monotonic
    ) -> None:
        model, limits = config.model, config.scheduler
        self.kv = KVManager(config.cache)
        self.scheduler = Scheduler(
            limits,
            self.kv,
            RequestLimits(
                model.vocab_size, model.max_model_len, limits.max_num_seqs, self.kv.capacity_tokens
            ),
            StopRules(model.eos_token_ids),
        )
        self._executor = executor
        self._clock = clock
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
        now_s = self._clock()
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        leader, *followers = (
            Request(
                request_id,
                prompt,
                params,
                index=i,
                seed=choice_seed(seed, i),
                scope=scope,
                explain=explain,
                arrival_s=now_s,
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
        return self.scheduler.has_work or bool(self._in_flight)

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
        try:
            plan = self.scheduler.schedule()
            if plan is not None:
                self._execute(plan)
            if self._in_flight and (plan is None or len(self._in_flight) >= self._steps_ahead):
                plan, handle = self._in_flight.popleft()
                outputs = self.scheduler.update(plan, handle.result())
            else:
                outputs = self.scheduler.take_outputs()
        except BaseException:
            self._in_flight.clear()
            self.scheduler.restart()
            raise
        return outputs

    def snapshot(self) -> EngineSnapshot:
        """The state between two steps. Cheap: counts that are kept anyway."""
        scheduler, pool, counters = self.scheduler, self.kv.pool, self.scheduler.counters
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
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            evicted_blocks={EvictionCause.CAPACITY.value: pool.evictions},
            preemptions=counters.preemptions,
            recomputed_tokens=counters.recomputed_tokens,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            requests_finished=dict(counters.finished),
        )

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes; running requests are not disturbed."""
        self.kv.reset_prefix_cache()

    def check(self) -> None:
        """The full audit of blocks and rows, in time proportional to the pool: for tests and idle times.

        Raises:
            AssertionError: our own bug; the engine should not go on.
        """
        self.scheduler.check()

    def _execute(self, plan: StepPlan) -> None:
        self._executor.forward(plan)
        self._in_flight.append((plan, self._executor.sample(plan)))

    def _check_idle(self) -> None:
        """What costs nothing is checked whenever nothing runs, before anything changes."""
        if self.kv.pool.num_in_use:
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


def _token_ids(prompt_ids: Sequence[int]) -> list[int]:
    """Plain unsigned 32-bit integers, or an error that names the prompt."""
    try:
        return array("I", prompt_ids).tolist()
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest("The prompt must be a list of token ids.", "prompt") from None
