"""How long the state machines run: the same cases each time, and a count of the steps taken.

QUIRE_PROPERTY_SCALE multiplies the number of cases and draws new ones (a nightly run sets 20).
"""

from __future__ import annotations

import logging
import os
from collections import Counter

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

SCALE = int(os.environ.get("QUIRE_PROPERTY_SCALE", "1"))

steps_taken: Counter[str] = Counter()


def run_machine(
    machine: type[RuleBasedStateMachine], examples: int, steps: int, *, shrink: bool = True
) -> int:
    """Runs `examples` cases of `steps` rules each; returns how many rules were run.

    Args:
        shrink: look for the shortest failing case; without it the first failure is raised at once.
    """
    before = steps_taken[machine.__name__]
    logging.disable(logging.ERROR)  # the machines inject faults by the hundred
    try:
        _run(machine, examples, steps, shrink)
    finally:
        logging.disable(logging.NOTSET)
    return steps_taken[machine.__name__] - before


def _run(machine: type[RuleBasedStateMachine], examples: int, steps: int, shrink: bool) -> None:
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples * SCALE,
            stateful_step_count=steps,
            derandomize=SCALE == 1,
            database=None,
            deadline=None,
            phases=phases,
            report_multiple_bugs=False,
            verbosity=Verbosity.normal if shrink else Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        ),
    )
