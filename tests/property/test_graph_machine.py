"""Decode steps as graphs say what steps without graphs say."""

from __future__ import annotations

import pytest

from engine.types import StepRun
from tests.property.graph_machine import GraphMachine, MixedGraphMachine
from tests.property.runs import run_machine

EVERYWHERE = {StepRun.PROMPT, StepRun.UNCAPTURED, StepRun.GRAPH}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "seen"),
    [
        (GraphMachine, EVERYWHERE),
        (MixedGraphMachine, EVERYWHERE | {StepRun.GRAMMAR, StepRun.BIAS, StepRun.LOGPROBS}),
    ],
)
def test_graphs_change_nothing_but_the_time(
    machine: type[GraphMachine], seen: set[StepRun], capsys: pytest.CaptureFixture[str]
) -> None:
    steps = run_machine(machine, examples=20, steps=30, shrink=False)
    with capsys.disabled():
        print(f"[graph machine: {steps} engine steps, {dict(machine.runs)}] ", end="")
    for run in seen:
        assert machine.runs[run] > 5, f"hardly ever {run}"
    assert machine.runs["preemptions"] > 5
