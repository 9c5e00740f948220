"""Hypothesis drives two engines with the same model: one runs decode steps as graphs, one launch by launch.

Whatever comes and goes, and whenever a graph is captured, each step of both must say the same, to the last
bit of each log probability. The graphs are fakes that complain about moved memory and a host that waits.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from numpy.typing import NDArray

from engine import grammar
from engine.core import EngineCore
from engine.grammar import Grammar, Matcher
from engine.plan import StepPlan
from engine.types import SamplingParams
from tests.helpers.audit import check_core
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.helpers.engines import make_core
from tests.helpers.fake_graphs import FakeGraphs
from tests.property.runs import steps_taken

MODELS = {"llama": {}, "mistral": {"sliding_window": 16}, "qwen3": {}}
PROMPTS = [[5, 17, 3], list(range(10, 26)), [(7 * i + 3) % 90 + 5 for i in range(33)], [9]]
WORDS = -(-VOCAB_SIZE // 32)
EVEN = grammar.regex("even")

models = st.sampled_from(sorted(MODELS))
sampling = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.8, 1.5]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "top_k": st.sampled_from([0, 0, 7]),
        "seed": st.integers(0, 3),
        "max_tokens": st.sampled_from([4, 6, 17, 30]),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
    }
)
# What a request asks for beside: the first can be part of a graph, the others not.
PLAIN: list[dict[str, Any]] = [
    {},
    {},
    {"logprobs": 0},
    {"presence_penalty": 0.7},
    {"repetition_penalty": 1.3, "logprobs": 0},
]
OTHERS: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"frequency_penalty": 0.5, "logit_bias": {9: 3.0}},
    {"min_tokens": 4, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 3))},
    {"banned_sequences": ((5,), (9, 9))},
    {"prompt_logprobs": 1},
    {"grammar": EVEN},
    {"grammar": EVEN, "logprobs": 1},
]
configs = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([9, 14, 60]),
        "max_num_seqs": st.sampled_from([3, 8, 11]),
        "max_num_batched_tokens": st.sampled_from([11, 24, 512]),
        "steps_ahead": st.sampled_from([1, 2, 2]),
    }
)


class DeviceFault(Exception):
    """Raised on purpose once a step was launched."""


class Even:
    """Allows even tokens, and after some of them nothing more."""

    num_words = WORDS

    def __init__(self) -> None:
        self.taken = 0

    @property
    def ended(self) -> bool:
        return self.taken > 9

    def take(self, token_id: int) -> None:
        assert token_id % 2 == 0, "a token that the mask did not allow"
        self.taken += 1


class Evens:
    """A Grammars that knows one grammar."""

    def ready(self, grammar: Grammar) -> bool:
        return True

    def start(self, grammar: Grammar) -> Even:
        return Even()

    def fill(self, matchers: Sequence[Matcher], words_KW: NDArray[np.uint32]) -> list[str | None]:
        words_KW[:] = 0x55555555
        return [None] * len(matchers)


class GraphMachine(RuleBasedStateMachine):
    """The engine with graphs and the one without never differ."""

    extras = PLAIN
    runs: ClassVar[Counter[str]] = Counter()

    @initialize(options=configs, model=models, block_size=st.sampled_from([8, 16]), native=st.booleans())
    def make(self, options: dict[str, Any], model: str, block_size: int, native: bool) -> None:
        path = make_checkpoint(Path(tempfile.gettempdir()), model, **MODELS[model])
        self.maker = FakeGraphs()
        self.graphed, self.plain = (
            make_core(path, graph_maker=maker, block_size=block_size, **options)
            for maker in (self.maker, None)
        )
        # Captures take no time then: one between any two steps, whatever else the machine does.
        cast(Any, self.graphed._executor)._graphs._shelf._clock = lambda: 0.0
        self.most = options["max_num_seqs"]
        for core in self.cores():
            core.grammars = Evens()
            if not native:  # one layer after the other, as on a GPU
                cast(Any, core._executor)._model.native = None
        self.requests = 0

    def cores(self) -> tuple[EngineCore, EngineCore]:
        return self.graphed, self.plain

    @rule(prompt=st.sampled_from(PROMPTS), chosen=sampling, pick=st.integers(0, 59))
    def add(self, prompt: list[int], chosen: dict[str, Any], pick: int) -> None:
        extra = self.extras[pick % len(self.extras)]
        params = SamplingParams(**{**chosen, **extra, "n": min(chosen["n"], self.most)})
        if self.graphed.scheduler._ledger.num_live > 12:
            return
        for core in self.cores():
            core.add(str(self.requests), prompt, params)
        self.requests += 1

    @rule(count=st.sampled_from([1, 8, 60]))
    def prepare(self, count: int) -> None:
        """Graphs are captured, as between two steps or while nothing runs."""
        for _ in range(count):
            self.graphed.prepare()

    @precondition(lambda self: self.graphed.has_work)
    @rule(count=st.integers(1, 9))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 9), index=st.sampled_from([None, 0, 1]))
    def abort(self, pick: int, index: int | None) -> None:
        for core in self.cores():
            core.abort(str(self.requests - 1 - pick), index)

    @precondition(lambda self: self.graphed.has_work)
    @rule()
    def fault(self) -> None:
        """A step is launched, and never comes back."""
        raised = [self.raises(core) for core in self.cores()]
        assert raised[0] == raised[1]

    def raises(self, core: EngineCore) -> bool:
        executor = cast(Any, core._executor)
        forward = executor.forward

        def failing(plan: StepPlan) -> None:
            forward(plan)
            raise DeviceFault

        executor.forward = failing
        try:
            core.step()
        except DeviceFault:
            return True
        finally:
            del executor.forward
        return False

    def one_step(self) -> None:
        steps_taken[type(self).__name__] += 1
        said, expected = ([output._replace(queued_s=None) for output in core.step()] for core in self.cores())
        assert said == expected
        for core in self.cores():
            check_core(core)

    def teardown(self) -> None:
        while self.graphed.has_work:
            self.one_step()
            self.graphed.prepare()
        assert not self.plain.has_work
        snapshot = self.graphed.snapshot()
        self.runs.update(snapshot.step_runs)
        self.runs["preemptions"] += snapshot.preemptions
        assert self.plain.snapshot().step_runs["eager off"] == sum(snapshot.step_runs.values())


class MixedGraphMachine(GraphMachine):
    """Some requests need more than a graph can do."""

    extras = PLAIN + OTHERS
    runs: ClassVar[Counter[str]] = Counter()
