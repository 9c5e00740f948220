"""Block pool, prefix cache and page tables against a model that is too simple to be wrong."""

from __future__ import annotations

import pytest

from tests.property.kv_machine import ConstantHashKVMachine, KVMachine, WeakHashKVMachine
from tests.property.runs import run_machine

# A failing case is shortened for up to 300 s before it is shown.
pytestmark = pytest.mark.timeout(900)


def test_kv_manager_does_what_the_naive_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    steps = run_machine(KVMachine, examples=760, steps=100)
    with capsys.disabled():
        print(f"[KV machine: {steps} steps] ", end="")
    assert steps >= 50_000


@pytest.mark.parametrize("machine", [WeakHashKVMachine, ConstantHashKVMachine])
def test_forged_hashes_are_harmless(machine: type[KVMachine], capsys: pytest.CaptureFixture[str]) -> None:
    steps = run_machine(machine, examples=48, steps=100)
    with capsys.disabled():
        print(f"[{machine.__name__}: {steps} steps] ", end="")
    assert steps >= 2_000
