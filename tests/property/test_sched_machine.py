"""The scheduler, the KV cache and the core together, against an oracle that knows only text."""

from __future__ import annotations

import pytest

from tests.property.runs import run_machine
from tests.property.sched_machine import SchedMachine

# A failing case is shortened for up to 300 s before it is shown.
pytestmark = pytest.mark.timeout(900)


def test_every_choice_ends_once_with_the_right_text(capsys: pytest.CaptureFixture[str]) -> None:
    steps = run_machine(SchedMachine, examples=320, steps=50)
    with capsys.disabled():
        print(f"[scheduler machine: {steps} engine steps] ", end="")
    assert steps >= 20_000
