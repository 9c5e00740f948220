"""A decoder on the Triton kernels, in the interpreter: right, few launches, deterministic if asked."""

from __future__ import annotations

import collections
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks.models import assemble, random_weights, read_spec
from engine.model.arch import ArchSpec
from engine.model.transformer import ModelWeights, Transformer
from kernels import api
from tests.helpers.kernels import multiply_rows_alike
from tests.helpers.steps import Memory, Part

CPU = torch.device("cpu")
PROMPT = [(37 * i + 11) % 64 for i in range(20)]
OTHERS: list[Part] = [(1, 0, [5, 6, 7]), (2, 0, [(11 * i) % 64 for i in range(18)])]


def small_spec() -> ArchSpec:
    """A Qwen 3 of one layer, with query and key norms."""
    spec = read_spec("tiny")
    return dataclasses.replace(
        spec,
        num_layers=1,
        windows=spec.windows[:1],
        ropes=(dataclasses.replace(spec.ropes[0], dims=32),),
        qk_norm=True,
        vocab_size=64,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        mlp_size=64,
    )


@pytest.fixture
def on_triton(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to the Triton kernels, as CUDA tensors do."""
    if device == "cuda":
        pytest.skip("tests/integration/test_engine_cuda.py is for that")
    from importlib import import_module

    monkeypatch.setattr(api, "native_decoder", lambda *_: None)
    monkeypatch.setattr(api, "_backend", lambda op, _: import_module(f"kernels.{op}.triton"))
    monkeypatch.setattr(
        api, "rotate_and_write", import_module("kernels.rotate_and_write.triton").rotate_and_write
    )
    monkeypatch.setattr(
        api, "paged_attention", import_module("kernels.paged_attention.triton").paged_attention
    )


def fixed_order(spec: ArchSpec) -> Transformer:
    """The model as deterministic mode loads it on a GPU."""
    from kernels.linear import triton

    slots = list(random_weights(spec, dtype=torch.bfloat16, device=CPU))
    linear = {slot.name: triton.pack_16_bits(weight, None) for slot, weight in slots if slot.linear}
    dense = {slot.name: weight for slot, weight in slots if not slot.linear}
    if spec.tied_embeddings:
        linear["lm_head"] = triton.pack_16_bits(dense["embed"], None)
    return Transformer(spec, ModelWeights(dense, linear), 128, deterministic=True)


def test_logits_are_those_of_the_cpu(device: str, request: pytest.FixtureRequest) -> None:
    spec = small_spec()
    model = assemble(spec, random_weights(spec, dtype=torch.bfloat16, device=CPU), 128)
    cpu, triton = Memory(model), Memory(model)
    want = [cpu.logits(*OTHERS, (0, 0, PROMPT))[-1], cpu.logits((0, 20, [7]))[0]]
    request.getfixturevalue("on_triton")
    model.native = None
    got = [triton.logits(*OTHERS, (0, 0, PROMPT))[-1], triton.logits((0, 20, [7]))[0]]
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).abs().max() < 0.05 * theirs.std()
    alone = Memory(model).last_logits(*OTHERS, (0, 0, PROMPT), of=[0, 2])
    assert (alone[1] - want[0][-1]).abs().max() < 0.05 * want[0].std()
    assert Memory(model).last_logits((0, 0, PROMPT), of=[]).shape == (0, spec.vocab_size)


def test_deterministic_logits_do_not_depend_on_the_batch(
    on_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_rows_alike(monkeypatch)
    model = fixed_order(small_spec())
    alone, crowd = Memory(model), Memory(model)
    [whole] = alone.logits((0, 0, PROMPT))
    [next_token] = alone.logits((0, 20, [7]))
    assert torch.equal(crowd.logits(*OTHERS, (0, 0, PROMPT))[-1], whole)
    steps: list[Part] = [(1, 3, [9]), (0, 20, [7]), (2, 18, [9])]
    assert torch.equal(crowd.logits(*steps)[1], next_token)


def test_a_dense_layer_is_at_most_nine_kernels(on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    spec = small_spec()
    two = dataclasses.replace(spec, num_layers=2, windows=spec.windows * 2, ropes=spec.ropes * 2)
    memory = [
        Memory(assemble(s, random_weights(s, dtype=torch.bfloat16, device=CPU), 128)) for s in (spec, two)
    ]
    launched: collections.Counter[str] = collections.Counter()
    stock_call, stock_linear = GridExecutor.__call__, api.linear

    def call(self: GridExecutor, *args: object, **kwargs: object) -> None:
        launched[self.fn.__name__] += 1
        stock_call(self, *args, **kwargs)

    def linear(x: torch.Tensor, packed: api.PackedLinear) -> torch.Tensor:
        launched["linear"] += 1
        return stock_linear(x, packed)

    monkeypatch.setattr(GridExecutor, "__call__", call)
    monkeypatch.setattr(api, "linear", linear)
    totals = []
    for each in memory:
        launched.clear()
        each.logits((0, 0, [5]), (1, 0, [6]))
        totals.append(launched.copy())
    layer = SimpleNamespace(**(totals[1] - totals[0]))
    assert vars(layer) == {
        "_rms_norm": 2, "linear": 4, "_rotate_and_write": 1, "_decode": 1, "_silu_mul": 1
    }  # fmt: skip
    assert sum(vars(layer).values()) <= 9
