"""Graphs of decode steps: what is captured when, what the host says, and that the fake graph is strict."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import transfer
from engine.exec import lanes as lanes_module
from engine.exec.decode import Work
from engine.exec.graphs import GraphShelf, padded_sizes
from engine.exec.lanes import Lanes
from engine.exec.rows import Rows
from engine.plan import SequencePlan
from engine.process import frames
from engine.process.loop import EngineLoop
from engine.sample.sampler import PlainDraw
from engine.types import SamplingParams, StepRun
from kernels import api
from kernels.types import SampleParams
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.engines import OF_EVERY_KIND, guard_launches, make_core, run
from tests.helpers.fake_graphs import FakeGraph, FakeGraphs, HostWaited, PointerMoved, no_waiting


def test_sizes_grow_with_what_padding_costs() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(6) == [1, 2, 4, 6]
    assert padded_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert padded_sizes(300)[-4:] == [248, 256, 288, 300]


# ---- the shelf


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class SlowMaker(FakeGraphs):
    """A capture takes 0.1 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def capture(self, launch) -> FakeGraph:  # type: ignore[no-untyped-def]
        self._clock.now_s += 0.1
        return super().capture(launch)


def shelf_of(*sizes: int) -> tuple[GraphShelf, list[str], Clock, FakeGraphs]:
    log: list[str] = []
    clock = Clock()
    maker = SlowMaker(clock)
    shelf = GraphShelf(
        maker,
        lambda work: log.append(f"pad {work.size}"),
        lambda work: log.append(f"launch {work.size}"),
        [Work(size) for size in sizes],
        clock,
    )
    return shelf, log, clock, maker


def test_the_largest_are_captured_first_and_those_that_were_missed_before_them() -> None:
    shelf, log, _, _ = shelf_of(1, 2, 4)
    assert shelf.find(Work(2)) is None
    while shelf.capture_next():
        pass
    assert log == ["pad 2", "launch 2", "pad 4", "launch 4", "pad 1", "launch 1"]
    assert all(shelf.find(Work(size)) for size in (1, 2, 4))
    assert not shelf.capture_next()


def test_while_requests_run_captures_keep_their_distance() -> None:
    shelf, _, clock, _ = shelf_of(1, 2, 4)
    assert shelf.capture_if_due()
    clock.now_s += 0.85
    assert not shelf.capture_if_due(), "a tenth of the time is 0.1 s of one second"
    clock.now_s += 0.1
    assert shelf.capture_if_due()
    assert shelf.capture_next(), "with nothing to do there is no reason to wait"


def test_after_a_failed_capture_steps_go_on_without_more_graphs(caplog: pytest.LogCaptureFixture) -> None:
    shelf, _, _, maker = shelf_of(1, 2)
    shelf.capture_next()
    maker.fail = RuntimeError("out of memory")
    with caplog.at_level(logging.ERROR):
        assert shelf.capture_next()
    assert "steps without a graph run launch by launch" in caplog.text
    maker.fail = None
    assert shelf.find(Work(2)) is not None
    assert shelf.find(Work(1)) is None
    assert not shelf.capture_next()


def test_each_capture_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    shelf, _, _, _ = shelf_of()
    shelf.find(Work(8, draw=None))
    shelf.find(Work(4, PlainDraw(filters=True, penalty_capacity=4), logprobs=True))
    with caplog.at_level(logging.INFO):
        while shelf.capture_next():
            pass
    assert (
        "4 sequences, draw + filters + penalties + log probabilities, in 100 ms (1 so far, 1 to come)"
        in caplog.text
    )
    assert "8 sequences, forward only" in caplog.text


# ---- lanes


def decode(
    row: int, start: int, *, blocks: tuple[int, ...] = (), token: tuple[int, ...] = ()
) -> SequencePlan:
    return SequencePlan(row, start, 1, token, blocks, True)


def test_the_host_speaks_only_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []

    def counted(values: torch.Tensor, target: torch.Tensor) -> None:
        copies.append(values.numel())
        transfer.send(values, target)

    monkeypatch.setattr(lanes_module, "send", counted)
    rows = Rows(6, 8, torch.device("cpu"))
    lanes = Lanes(rows, 8)
    lanes.say(4, [decode(3, 10), decode(1, 4)])
    assert lanes.tensor(4).tolist() == [[3, 1, 6, 6], [10, 4, -1, -1], [-1] * 4, [-1] * 4, [0] * 4]
    lanes.say(4, [decode(3, 11), decode(1, 5)])
    assert copies == [20], "positions move on by themselves"
    lanes.say(4, [decode(3, 12), decode(1, 6, blocks=(77,))])
    assert lanes.tensor(4)[:, 1].tolist() == [1, 6, -1, 0, 77]
    lanes.say(4, [decode(3, 13), decode(1, 7, token=(5,))])
    assert lanes.tensor(4)[:, 1].tolist() == [1, 7, 5, -1, 0]
    lanes.say(4, [decode(1, 8), decode(3, 14)])
    assert lanes.tensor(4)[0].tolist() == [1, 3, 6, 6]
    lanes.say(2, [decode(1, 9), decode(3, 15)])
    assert lanes.tensor(2)[:2].tolist() == [[1, 3], [9, 15]]
    assert copies == [20, 20, 20, 20, 10]
    lanes.forget()
    lanes.say(2, [decode(1, 19), decode(3, 15)])
    assert lanes.tensor(2)[1].tolist() == [19, 15]


# ---- the whole engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


REQUESTS = [
    ("greedy", [5, 17, 3], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)),
    ("sampled", [9] * 18, SamplingParams(top_p=0.9, top_k=8, seed=3, max_tokens=20, ignore_eos=True, n=2)),
]


def test_a_decode_step_is_one_graph_and_says_so(checkpoint: Path) -> None:
    maker = FakeGraphs()
    core = make_core(checkpoint, graph_maker=maker, steps_ahead=2)
    while core.prepare():
        pass
    streams = run(core, REQUESTS)
    assert {key: s.token_ids for key, s in streams.items()} == {
        key: s.token_ids for key, s in run(make_core(checkpoint), REQUESTS).items()
    }
    runs = core.snapshot().step_runs
    assert runs[StepRun.PROMPT] == 1
    assert runs[StepRun.GRAPH] == maker.replays == core.snapshot().steps - 1


def test_graphs_are_captured_while_requests_run(checkpoint: Path) -> None:
    maker = FakeGraphs()
    core = make_core(checkpoint, graph_maker=maker)
    run(core, REQUESTS)
    assert 1 <= len(maker.graphs) < len(padded_sizes(8)), "between steps, but not for most of the time"
    assert core.snapshot().step_runs[StepRun.UNCAPTURED] > 0


def test_an_engine_without_work_captures_all_graphs(checkpoint: Path) -> None:
    done = threading.Event()
    sizes = padded_sizes(8)

    class Telling(FakeGraphs):
        def capture(self, launch) -> FakeGraph:  # type: ignore[no-untyped-def]
            graph = super().capture(launch)
            if len(self.graphs) == 2 * len(sizes):
                done.set()
            return graph

    heard: list[frames.Outputs] = []
    core = make_core(checkpoint, graph_maker=Telling())
    loop = EngineLoop(core, heard.append)  # type: ignore[arg-type]
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert done.wait(60)
    loop.put(frames.Shutdown())
    thread.join(60)
    assert not thread.is_alive()


def test_without_graphs_steps_are_eager(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    assert not core.prepare()
    run(core, REQUESTS)
    assert core.snapshot().step_runs == {
        **{run.value: 0 for run in StepRun},
        StepRun.OFF: core.snapshot().steps,
    }


def test_the_step_path_never_waits(checkpoint: Path) -> None:
    """Launching prompts and decodes, drawing with every kind of parameters, without a look at a value."""
    core = make_core(checkpoint, graph_maker=FakeGraphs(), steps_ahead=2)
    launched = guard_launches(core, no_waiting)
    for requests in (REQUESTS, REQUESTS, OF_EVERY_KIND):
        run(core, requests)
        core.prepare()
    assert len(launched) > 40


class Launches(TorchDispatchMode):
    """Counts what would be launches on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name not in ("empty", "select", "slice", "view", "detach"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_plain_draw_is_nine_launches(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(logits_SV: torch.Tensor, params: SampleParams) -> torch.Tensor:
        launches.names += ["_draw", "_pick"]
        return torch.empty(len(logits_SV), dtype=torch.int64).fill_(3)

    core = make_core(checkpoint, graph_maker=FakeGraphs())
    step = cast(Any, core._executor)._graphs._step
    lanes_5S = torch.zeros((5, 4), dtype=torch.int64)
    monkeypatch.setattr(api, "sample", sample)
    monkeypatch.setattr(step._model, "logits", lambda hidden_SE: hidden_SE)
    launches = Launches()
    with launches:
        step._draw(Work(4), PlainDraw(), torch.zeros(4, 100), lanes_5S[0])
    *others, written = [name for name in launches.names if name not in ("zeros", "fill_")]
    assert others == ["amax", "mul", "eq", "index", "index", "_draw", "_pick", "where"]
    assert written == "index_put_"


# ---- the fake is strict


def test_a_graph_on_other_memory_is_noticed() -> None:
    held = [torch.zeros(4)]
    graph = FakeGraph(lambda: held[0].add_(1))  # type: ignore[arg-type, func-returns-value]
    graph.replay()
    assert held[0].tolist() == [2.0] * 4
    held[0] = torch.zeros(4)
    with pytest.raises(PointerMoved):
        graph.replay()


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: x.numpy(),
        lambda x: float(x[0]),
        lambda x: [0, 1][x.long()[0]],
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
    ],
)
def test_a_host_that_waits_is_noticed(look) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(HostWaited), no_waiting():
        look(torch.ones(4))
