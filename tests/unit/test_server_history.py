"""Samples of the last 15 minutes: rates, percentiles, shares, engines that start again, followers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from engine.stats import SECONDS
from engine.types import EngineSnapshot
from engine.views import TenantUse
from server.history import History, quantile
from server.metrics import Metrics
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import CHAT, HELLO, in_process

pytestmark = pytest.mark.anyio

START_S = 1_800_000_000.0
IDLE = EngineSnapshot(blocks_total=10, blocks_free=10)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine(FakeClient):
    def __init__(self) -> None:
        super().__init__()
        self.said = IDLE

    def snapshot(self) -> EngineSnapshot:
        return self.said


class Bench:
    """A history whose clock and engine are moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.engine = Engine()
        self.metrics = Metrics(self.engine, "m")
        self.metrics.engine_started()
        self.history = History(
            self.metrics, clock=lambda: self.now_s, wall_clock=lambda: START_S + self.now_s
        )

    def after(self, seconds: float, **changes: Any) -> dict[str, Any]:
        """A sample, so much later, of an engine that says this."""
        self.now_s += seconds
        self.engine.said = replace(self.engine.said, **changes)
        return self.history.sample()


def test_a_sample_of_nothing() -> None:
    assert Bench().after(2.0) == {
        "t": START_S + 2,
        "running": 0,
        "waiting": 0,
        "blocks": {"in_use": 0, "shared": 0, "cached": 0, "free": 10},
        "tokens_held": 0,
        "tenants": {},
        "prompt_tokens_per_s": 0.0,
        "generated_tokens_per_s": 0.0,
        "hit_tokens_per_s": 0.0,
        "query_tokens_per_s": 0.0,
        "evictions_per_s": 0.0,
        "preemptions_per_s": 0.0,
        "busy_share": 0.0,
        "ttft_p50_s": None,
        "ttft_p95_s": None,
        "inter_token_p50_s": None,
        "inter_token_p95_s": None,
        "whatif": {"0.5": None, "1": None, "2": None, "4": None, "8": None},
        "hit_ratio": None,
    }


def test_a_sample_is_of_the_time_since_the_one_before() -> None:
    bench = Bench()
    bench.after(2.0, steps=5, prompt_tokens=1000, generated_tokens=100, busy_s=1.0)
    sample = bench.after(
        4.0,
        steps=9,
        running=3,
        waiting=1,
        blocks_in_use=4,
        blocks_shared=1,
        blocks_cached=2,
        blocks_free=4,
        tokens_held=60,
        prompt_tokens=1400,
        generated_tokens=120,
        prefix_hit_tokens=200,
        prefix_query_tokens=400,
        evicted_blocks={"capacity": 5, "reset": 3},
        preemptions=2,
        busy_s=4.0,
        tenants={"key-1": TenantUse(blocks_in_use=4, blocks_cached=2)},
    )
    expected = {
        "t": START_S + 6,
        "running": 3,
        "waiting": 1,
        "blocks": {"in_use": 4, "shared": 1, "cached": 2, "free": 4},
        "tokens_held": 60,
        "tenants": {"key-1": {"in_use": 4, "cached": 2}},
        "prompt_tokens_per_s": 100.0,
        "generated_tokens_per_s": 5.0,
        "hit_tokens_per_s": 50.0,
        "query_tokens_per_s": 100.0,
        "evictions_per_s": 2.0,
        "preemptions_per_s": 0.5,
        "busy_share": 0.75,
        "hit_ratio": 0.5,
    }
    assert {name: sample[name] for name in expected} == expected
    assert json.loads(json.dumps(sample)) == sample
    assert bench.after(2.0)["generated_tokens_per_s"] == 0.0


def test_the_busy_share_is_a_share() -> None:
    assert Bench().after(2.0, busy_s=3.0)["busy_share"] == 1.0


def test_percentiles_are_of_the_interval_alone() -> None:
    bench = Bench()
    bench.metrics.first_token_s.observe(100.0, 50)
    assert bench.after(2.0)["ttft_p50_s"] == 90.0  # between 60 and 120
    bench.metrics.first_token_s.observe(0.015, 100)
    bench.metrics.inter_token_s.observe(0.0015, 90)
    bench.metrics.inter_token_s.observe(0.3, 10)
    sample = bench.after(2.0)
    assert sample["ttft_p50_s"] == pytest.approx(0.015)
    assert sample["ttft_p95_s"] == pytest.approx(0.0195)
    assert sample["inter_token_p50_s"] == pytest.approx(0.001 + 0.001 * 50 / 90, abs=1e-6)
    assert sample["inter_token_p95_s"] == pytest.approx(0.35)
    assert bench.after(2.0)["ttft_p50_s"] is None


@pytest.mark.parametrize(
    ("share", "counts", "expected"),
    [
        (0.5, (0, 0, 0), None),
        (0.5, (10, 0, 0), 0.5),
        (0.5, (0, 10, 0), 2.0),
        (1.0, (10, 0, 0), 1.0),
        (0.5, (5, 5, 0), 1.0),
        (0.95, (0, 0, 7), 3.0),
        (0.95, (0, 100, 1), pytest.approx(1 + 2 * 0.9595)),
    ],
)
def test_quantiles(share: float, counts: tuple[int, ...], expected: float | None) -> None:
    assert quantile(share, (1.0, 3.0), counts) == expected


def test_quantiles_lie_in_the_bucket_of_the_real_one() -> None:
    for bucket in range(len(SECONDS)):
        counts = [0] * (len(SECONDS) + 1)
        counts[bucket] = 3
        low = SECONDS[bucket - 1] if bucket else 0.0
        for share in (0.01, 0.5, 0.95, 0.999):
            found = quantile(share, SECONDS, counts)
            assert found is not None and low <= found <= SECONDS[bucket]


def queries(count: int) -> dict[str, Any]:
    """What an engine says after `count` prompts of 100 tokens, of which 40 were found."""
    return {
        "prefix_query_tokens": 100 * count,
        "prefix_hit_tokens": 40 * count,
        "whatif_hit_tokens": {"0.5": 20 * count, "1": 41 * count, "2": 60 * count, "4": 70 * count},
    }


def test_shares_are_of_the_last_15_minutes() -> None:
    bench = Bench()
    sample = bench.after(2.0, **queries(10))
    assert sample["hit_ratio"] == 0.4
    assert sample["whatif"] == {"0.5": 0.2, "1": 0.41, "2": 0.6, "4": 0.7, "8": None}
    for _ in range(449):
        sample = bench.after(2.0)
    assert sample["hit_ratio"] == 0.4, "900 seconds: still in the window"
    assert bench.after(2.0)["hit_ratio"] is None
    assert bench.after(2.0, prefix_query_tokens=2000)["hit_ratio"] == 0.0


def test_it_keeps_15_minutes() -> None:
    bench = Bench()
    for _ in range(460):
        bench.after(2.0)
    kept = bench.history.samples()
    assert len(kept) == 450
    assert kept[-1]["t"] - kept[0]["t"] == 898
    assert kept[-1]["t"] == START_S + 920


RATES = (
    "prompt_tokens_per_s",
    "generated_tokens_per_s",
    "hit_tokens_per_s",
    "query_tokens_per_s",
    "evictions_per_s",
    "preemptions_per_s",
    "busy_share",
)


@pytest.mark.parametrize("told", [True, False], ids=["restart counted", "counters fell"])
def test_a_new_engine_makes_no_negative_rates(told: bool) -> None:
    bench = Bench()
    busy: dict[str, Any] = {
        "steps": 100,
        "prompt_tokens": 500,
        "generated_tokens": 1000,
        "evicted_blocks": {"capacity": 9},
        "preemptions": 3,
        "busy_s": 50.0,
    }
    bench.after(2.0, **busy, **queries(10))
    bench.engine.restarts += told
    bench.engine.said = IDLE
    # It made more prompt tokens than the old one ever did, and fewer of the rest.
    sample = bench.after(2.0, steps=3, prompt_tokens=600, generated_tokens=8, busy_s=0.5, **queries(1))
    assert all(sample[name] >= 0 for name in RATES)
    assert (sample["prompt_tokens_per_s"], sample["generated_tokens_per_s"]) == (300.0, 4.0)
    assert sample["evictions_per_s"] == 0.0
    assert sample["hit_ratio"] == 0.4, "of 1100 tokens looked up by both"
    assert bench.after(2.0, generated_tokens=10)["generated_tokens_per_s"] == 1.0


def test_a_dead_engine_runs_nothing() -> None:
    bench = Bench()
    bench.after(2.0, running=4, blocks_in_use=10, blocks_free=0, generated_tokens=100)
    bench.engine.sickness = "dead"
    sample = bench.after(2.0)
    assert (sample["running"], sample["blocks"]["in_use"], sample["blocks"]["free"]) == (0, 0, 10)
    assert sample["generated_tokens_per_s"] == 0.0


def test_no_time_between_two_samples() -> None:
    assert Bench().after(0.0, generated_tokens=5)["generated_tokens_per_s"] == 0.0


async def next_of(samples: AsyncIterator[dict[str, Any]]) -> asyncio.Task[dict[str, Any]]:
    """Asks for a sample and lets the question reach its wait."""
    task = asyncio.ensure_future(anext(samples))
    await asyncio.sleep(0)
    return task


async def test_followers_get_each_new_sample_once() -> None:
    bench = Bench()
    bench.after(2.0)
    one, two = bench.history.follow(), bench.history.follow()
    waits = [await next_of(one), await next_of(two)]
    assert not any(wait.done() for wait in waits), "what was before is in samples()"
    first = bench.after(2.0)
    assert [await wait for wait in waits] == [first, first]
    second, third = bench.after(2.0), bench.after(2.0)
    assert [await anext(one), await anext(one)] == [second, third]
    assert await anext(two) == second
    fourth = bench.after(2.0)
    assert [await anext(two), await anext(two)] == [third, fourth]
    assert await anext(one) == fourth


async def test_a_follower_misses_nothing_before_it_first_asks() -> None:
    bench = Bench()
    bench.after(2.0)
    samples = bench.history.follow()
    first = bench.after(2.0)
    assert await anext(samples) == first


async def test_a_follower_who_sleeps_misses_the_oldest() -> None:
    bench = Bench()
    samples = bench.history.follow()
    wait = await next_of(samples)
    bench.after(2.0)
    await wait
    for _ in range(500):
        bench.after(2.0)
    assert await anext(samples) == bench.history.samples()[0]
    assert [await anext(samples) for _ in range(449)][-1] == bench.history.samples()[-1]
    wait = await next_of(samples)
    assert not wait.done()
    await bench.history.stop()
    with pytest.raises(StopAsyncIteration):
        await wait


async def test_one_who_leaves_does_not_disturb_the_others() -> None:
    bench = Bench()
    stays, leaves = bench.history.follow(), bench.history.follow()
    wait, gone = await next_of(stays), await next_of(leaves)
    gone.cancel()
    await asyncio.wait({gone})
    sample = bench.after(2.0)
    assert await wait == sample


async def test_it_samples_by_itself_until_it_is_stopped() -> None:
    history = History(Metrics(FakeClient(), "m"), interval_s=0.001)
    history.start()
    samples = history.follow()
    seen = [sample async for sample in _first(samples, 5)]
    assert [sample["t"] for sample in seen] == sorted(sample["t"] for sample in seen)
    await history.stop()
    seen += [sample async for sample in samples]
    assert history.samples()[: len(seen)] == seen
    assert "history" not in [task.get_name() for task in asyncio.all_tasks()]


async def _first(samples: AsyncIterator[dict[str, Any]], count: int) -> AsyncIterator[dict[str, Any]]:
    for _ in range(count):
        yield await anext(samples)


async def test_the_server_keeps_one() -> None:
    async with in_process() as (http, _):
        history: History = http._transport.app.state.service.history
        await http.post(CHAT, json={"messages": HELLO})
        sample = history.sample()
        assert sample["prompt_tokens_per_s"] > 0 and sample["ttft_p50_s"] is not None
        follower = await next_of(history.follow())
    await asyncio.wait({follower})
    assert isinstance(follower.exception(), StopAsyncIteration)
