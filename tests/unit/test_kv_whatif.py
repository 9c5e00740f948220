"""What pools of other sizes would have had: against the same trace, replayed with pools of those sizes."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import pytest

from engine.config import CacheConfig
from engine.core import EngineCore
from engine.kv.counts import WHATIF_KEYS, CacheCounts
from engine.kv.manager import KVManager
from engine.plan import StepPlan, StepResult, TokenMasks
from engine.request import Request, Status
from engine.types import SamplingParams
from engine.views import WHATIF_SIZES
from tests.helpers.audit import check_core, check_kv
from tests.helpers.fake_executor import make_config

P = 16
POOL = 320
CONVERSATIONS = 200
POINTS = 0.02
PARAMS = SamplingParams()


@dataclass
class Turn:
    """One request of the trace: it begins, computes its prompt over some events, decodes, and ends."""

    prompt: list[int]
    answer: list[int]
    chunk: int


@dataclass
class Zipf:
    """Draws 0 ... n - 1, k with a weight of 1 / (k + 1) ** power."""

    n: int
    power: float
    weights: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = list(accumulate((k + 1) ** -self.power for k in range(self.n)))

    def draw(self, rng: random.Random) -> int:
        return min(bisect(self.weights, rng.random() * self.weights[-1]), self.n - 1)


def make_trace(seed: int, turns: int) -> list[Turn]:
    """Conversations that share a few system prompts and grow, turn by turn; popular ones more often."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(rng.randint(low, high))]

    systems = [text(20, 200) for _ in range(12)]
    which_system, which = Zipf(len(systems), 1.0), Zipf(CONVERSATIONS, 0.7)
    conversations: list[list[int]] = [[] for _ in range(CONVERSATIONS)]
    trace = []
    for _ in range(turns):
        index = which.draw(rng)
        history = conversations[index]
        if not history or len(history) > 480:
            history = list(systems[which_system.draw(rng)])
        prompt, answer = history + text(5, 60), text(5, 40)
        conversations[index] = prompt + answer
        trace.append(Turn(prompt, answer, rng.choice((64, 256, 4096))))
    return trace


class Replay:
    """Runs a trace through a real manager, one turn per lane at a time; the same moments in any pool."""

    def __init__(self, trace: list[Turn], blocks: int, lanes: int) -> None:
        self.kv = KVManager(CacheConfig(P, blocks + 1, 1, True, "float32"))
        self.live: list[Request] = []
        self.measured: dict[int, int] = {}
        waiting = iter(enumerate(trace))
        running = [self.life(turn, index) for index, turn in (next(waiting) for _ in range(lanes))]
        while running:
            self.kv.tick(self.kv.now_s + 1)
            for lane in tuple(running):
                if next(lane, None) is None:
                    running.remove(lane)
                    if (following := next(waiting, None)) is not None:
                        running.append(self.life(following[1], following[0]))
        check_kv(self.kv, [])

    def life(self, turn: Turn, index: int) -> Iterator[bool]:
        kv = self.kv
        request = Request(str(index), turn.prompt, PARAMS)
        hit = kv.match(request)
        kv.account(request, hit)
        kv.adopt(request, hit)
        request.status, request.started = Status.RUNNING, True
        self.live.append(request)
        # As many events whatever was found, so that all pools see the same order.
        for end in range(turn.chunk, len(turn.prompt) + turn.chunk, turn.chunk):
            end = min(end, len(turn.prompt))
            if end > request.computed:
                assert kv.reserve(request, end) is not None, "the smallest pool must hold what runs"
                request.computed = end
            yield True
        request.confirmed = request.computed
        kv.commit(request)
        for token in turn.answer:
            request.token_ids.append(token)
            assert kv.reserve(request, len(request.token_ids)) is not None
            request.computed = request.confirmed = len(request.token_ids)
            kv.commit(request)
            yield True
        if index % 64 == 0:
            check_kv(kv, self.live)
        kv.release(request)
        self.live.remove(request)

    @property
    def hit_rate(self) -> float:
        return self.kv.counts.prefix_hit_tokens / self.kv.counts.prefix_query_tokens

    def expected(self) -> dict[str, float]:
        counts = self.kv.counts
        return {size: hits / counts.prefix_query_tokens for size, hits in counts.whatif_hit_tokens.items()}


@pytest.mark.parametrize(("seed", "lanes"), [(0, 1), (1, 2), (2, 4), (3, 4)])
def test_the_curve_is_what_a_replay_with_such_a_pool_measures(seed: int, lanes: int) -> None:
    trace = make_trace(seed, turns=700)
    expected = Replay(trace, POOL, lanes).expected()
    measured = {
        key: Replay(trace, int(POOL * size), lanes).hit_rate
        for key, size in zip(WHATIF_KEYS, WHATIF_SIZES, strict=True)
    }
    print({key: f"{expected[key]:.4f} expected, {measured[key]:.4f} measured" for key in expected})
    assert measured["8"] - measured["0.5"] > 0.15, "the trace does not tell sizes apart"
    for key in WHATIF_KEYS:
        assert abs(expected[key] - measured[key]) <= POINTS, f"a pool {key} times the size"
    assert expected["1"] == measured["1"]


class AlwaysSeven:
    """An executor without a model."""

    def forward(self, plan: StepPlan) -> None:
        pass

    def prepare(self) -> bool:
        return False

    def sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> AlwaysSeven:
        self.drawn = [7] * sum(sequence.samples for sequence in plan.sequences)
        return self

    def result(self) -> StepResult:
        return StepResult(self.drawn)


def serve(trace: list[Turn], blocks: int, steps_between: int) -> CacheCounts:
    """Serves a trace with a whole engine: one more turn arrives every few steps, whatever the others do."""
    core = EngineCore(
        make_config(block_size=P, num_blocks=blocks + 1, max_num_batched_tokens=256, vocab_size=1000),
        AlwaysSeven(),
    )
    for index, turn in enumerate(trace):
        params = SamplingParams(max_tokens=len(turn.answer), ignore_eos=True)
        core.add(str(index + 1), turn.prompt, params)
        for _ in range(steps_between):
            core.step()
    while core.has_work:
        core.step()
    check_core(core)
    return core.kv.counts


@pytest.mark.parametrize("steps_between", [2, 6])
def test_the_curve_holds_where_the_scheduler_decides(steps_between: int) -> None:
    """Requests queue, prompts are computed in pieces beside others, and pools decide who is admitted when."""
    trace = make_trace(seed=5, turns=500)
    counts = serve(trace, POOL, steps_between)
    for key, size in zip(WHATIF_KEYS, WHATIF_SIZES, strict=True):
        replayed = serve(trace, int(POOL * size), steps_between)
        expected = counts.whatif_hit_tokens[key] / counts.prefix_query_tokens
        measured = replayed.prefix_hit_tokens / replayed.prefix_query_tokens
        print(f"{key}: {expected:.4f} expected, {measured:.4f} measured")
        assert abs(expected - measured) <= POINTS, f"a pool {key} times the size"
