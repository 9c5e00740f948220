"""The engine under a grammar, without a model: when masks are made, of which tokens, and who pays for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import grammar
from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.grammar import Grammar, Matcher
from engine.plan import StepPlan, TokenMasks
from engine.process import frames
from engine.process.loop import EngineLoop
from engine.types import FinishReason, SamplingParams
from tests.helpers.audit import check_core
from tests.helpers.engines import run
from tests.helpers.fake_executor import VOCAB, FakeExecutor, Handle, make_config

WORDS = -(-VOCAB // 32)


class Ascending:
    """Allows tokens a little larger than the last one, from 10 on; at the largest it is complete."""

    num_words = WORDS

    def __init__(self, broken_after: int) -> None:
        self.taken: list[int] = []
        self.ended = False
        self._broken_after = broken_after

    def take(self, token_id: int) -> None:
        self.taken.append(token_id)
        self.ended = token_id == VOCAB - 1

    def write(self, words_W: NDArray[np.uint32]) -> str | None:
        if len(self.taken) == self._broken_after:
            return "it broke"
        bits = np.zeros(WORDS * 32, dtype=np.uint8)
        last = max([9, *self.taken])
        bits[last + 1 : min(last + 5, VOCAB)] = 1
        words_W[:] = np.packbits(bits, bitorder="little").view(np.uint32)
        return None


class Stairs:
    """A Grammars of one kind. A regex of digits breaks after so many tokens; "bad" does not compile."""

    def __init__(self) -> None:
        self.made: list[Ascending] = []
        self.known: set[Grammar] = set()
        self.gate = threading.Event()
        self.gate.set()

    def ready(self, wanted: Grammar) -> bool:
        return wanted in self.known

    def start(self, wanted: Grammar) -> Ascending:
        self.gate.wait(10)
        if wanted.text == "bad":
            raise InvalidRequest("It is bad.", "grammar")
        self.known.add(wanted)
        self.made.append(Ascending(int(wanted.text) if wanted.text.isdecimal() else 1000))
        return self.made[-1]

    def fill(self, matchers: Sequence[Matcher], words_KW: NDArray[np.uint32]) -> list[str | None]:
        return [cast(Ascending, m).write(words_W) for m, words_W in zip(matchers, words_KW, strict=True)]


def make(**limits: Any) -> tuple[EngineCore, Stairs]:
    config, stairs = make_config(**limits), Stairs()
    return EngineCore(config, FakeExecutor(config), grammars=stairs), stairs


HELD = grammar.regex("stairs")


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("blocks", [200, 14])
def test_every_choice_climbs(ahead: int, blocks: int) -> None:
    """Also with others in the batch, several choices, little memory, and prompts in pieces."""
    core, stairs = make(steps_ahead=ahead, num_blocks=blocks, max_num_batched_tokens=8)
    held = [
        (f"held-{i}", list(range(2, 8 + i)), SamplingParams(n=2, seed=i, grammar=HELD, max_tokens=40))
        for i in range(6)
    ]
    free = [
        (f"free-{i}", [3, 4, i], SamplingParams(seed=i, max_tokens=12, ignore_eos=True)) for i in range(3)
    ]
    streams = run(core, [*held, *free])
    for (name, _), stream in streams.items():
        if name.startswith("held"):
            ids = stream.token_ids
            assert ids == sorted(set(ids)) and ids[0] >= 10 and ids[-1] == VOCAB - 1
            assert stream.finish_reason is FinishReason.STOP
    assert len({tuple(matcher.taken) for matcher in stairs.made}) > 6
    alone = run(make()[0], free)
    assert {key: s.token_ids for key, s in streams.items() if key in alone} == {
        key: s.token_ids for key, s in alone.items()
    }
    assert (core.snapshot().preemptions > 0) == (blocks == 14)
    check_core(core)


class Watching(FakeExecutor):
    """Notes what happens between the two halves of a step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log: list[str] = []

    def forward(self, plan: StepPlan) -> None:
        self.log.append(f"forward {plan.step}")
        super().forward(plan)

    def sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> Handle:
        self.log.append(f"sample {plan.step}")
        handle = super().sample(plan, masks)
        inner = handle.result

        def result() -> Any:
            self.log.append(f"see {plan.step}")
            return inner()

        handle.result = result  # type: ignore[method-assign]
        return handle


@pytest.mark.parametrize("held", [False, True])
def test_a_mask_is_made_while_the_device_computes(held: bool) -> None:
    config = make_config(steps_ahead=2)
    executor = Watching(config)
    core = EngineCore(config, executor, grammars=Stairs())
    core.add(
        "r", [2, 3], SamplingParams(seed=1, max_tokens=3, ignore_eos=True, grammar=HELD if held else None)
    )
    for _ in range(3):
        core.step()
    if held:
        assert executor.log[:5] == ["forward 1", "sample 1", "forward 2", "see 1", "sample 2"]
    else:
        assert executor.log[:5] == ["forward 1", "sample 1", "forward 2", "sample 2", "see 1"]


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_grammar_that_breaks_ends_its_request_alone(ahead: int) -> None:
    core, _ = make(steps_ahead=ahead)
    params = SamplingParams(seed=1, max_tokens=30, grammar=grammar.regex("2"))
    good = SamplingParams(seed=2, max_tokens=30, grammar=HELD)
    streams = run(core, [("broken", [2, 3], params), ("good", [2, 3], good)])
    assert streams["broken", 0].finish_reason is FinishReason.ERROR
    assert len(streams["broken", 0].token_ids) <= 2
    assert streams["good", 0].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_failed_step_is_computed_again_from_the_same_place(ahead: int) -> None:
    core, stairs = make(steps_ahead=ahead)
    core.add("r", [2, 3], SamplingParams(seed=1, max_tokens=40, grammar=HELD))
    executor = core._executor
    assert isinstance(executor, FakeExecutor)
    tokens: list[int | None] = []
    for step in range(100):
        if step == 3:
            executor.fail_next = MemoryError()
        if not core.has_work:
            break
        try:
            tokens += [output.token_id for output in core.step()]
        except MemoryError:
            executor._forwarded = None
    assert [t for t in tokens if t is not None] == stairs.made[0].taken


def test_without_grammars_such_a_request_is_refused() -> None:
    config = make_config()
    core = EngineCore(config, FakeExecutor(config))
    with pytest.raises(InvalidRequest):
        core.add("r", [2], SamplingParams(grammar=HELD))
    assert not core.has_work


# The loop: a request waits for its grammar, and nobody waits for it.


class Running:
    """A loop on a thread, and what it says."""

    def __init__(self) -> None:
        self.core, self.stairs = make()
        self.said: queue.Queue[Any] = queue.Queue()
        self.loop = EngineLoop(self.core, self.said.put)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def until_ended(self, *wanted: str) -> dict[str, FinishReason | None]:
        ended: dict[str, FinishReason | None] = {}
        while not ended.keys() >= set(wanted):
            frame = self.said.get(timeout=10)
            if isinstance(frame, frames.Outputs):
                ended |= {o.request_id: o.finish_reason for o in frame.outputs if o.finish_reason}
        return ended

    def answer(self) -> frames.Answer:
        while not isinstance(frame := self.said.get(timeout=10), frames.Answer):
            pass
        return frame

    def close(self) -> None:
        self.stairs.gate.set()
        self.loop.put(frames.Shutdown())
        self.thread.join(10)


def submit(request_id: str, prompt_ids: list[int], params: SamplingParams) -> frames.Submit:
    return frames.Submit(request_id, frames.pack_ids(prompt_ids), params)


@pytest.fixture
def running() -> Any:
    made = Running()
    yield made
    made.close()


def test_others_go_on_while_a_grammar_is_compiled(running: Running) -> None:
    running.stairs.gate.clear()
    running.loop.put(submit("held", [2, 3], SamplingParams(seed=1, max_tokens=40, grammar=HELD)))
    running.loop.put(frames.Compile(7, grammar.regex("more")))
    running.loop.put(submit("free", [2, 3], SamplingParams(max_tokens=5)))
    assert "held" not in running.until_ended("free")
    running.stairs.gate.set()
    assert running.until_ended("held") == {"held": FinishReason.STOP}


def test_compile_is_answered(running: Running) -> None:
    running.loop.put(frames.Compile(7, HELD))
    assert running.answer() == frames.Answer(7)
    running.loop.put(frames.Compile(8, grammar.regex("bad")))
    assert running.answer() == frames.Answer(8, refusal="It is bad.")


def test_a_bad_grammar_ends_all_choices_of_its_request(running: Running) -> None:
    running.loop.put(submit("r", [2], SamplingParams(n=2, grammar=grammar.regex("bad"))))
    assert running.until_ended("r") == {"r": FinishReason.ERROR}


def test_cancelled_while_its_grammar_is_compiled(running: Running) -> None:
    running.stairs.gate.clear()
    running.loop.put(submit("r", [2, 3], SamplingParams(seed=1, max_tokens=40, grammar=HELD)))
    running.loop.put(frames.Abort("r"))
    running.loop.put(submit("free", [2, 3], SamplingParams(max_tokens=2)))
    running.until_ended("free")
    running.stairs.gate.set()
    assert running.until_ended("r") == {"r": FinishReason.ABORT}
