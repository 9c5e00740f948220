"""Metric names, labels and the books: what Prometheus sees is regular, bounded and adds up."""

from __future__ import annotations

import asyncio
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import FastHistogram
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, in_process

pytestmark = pytest.mark.anyio

EXPECTED = {
    "quire_build_info",
    "quire_engine_requests_finished",
    "quire_engine_restarts",
    "quire_engine_steps",
    "quire_engine_up",
    "quire_generated_tokens",
    "quire_http_requests",
    "quire_http_requests_active",
    "quire_inter_token_seconds",
    "quire_kv_blocks",
    "quire_kv_blocks_shared",
    "quire_kv_evicted_blocks",
    "quire_kv_pool_blocks",
    "quire_kv_tokens_held",
    "quire_kv_usage_ratio",
    "quire_preemptions",
    "quire_prefix_hit_tokens",
    "quire_prefix_query_tokens",
    "quire_prompt_tokens",
    "quire_recomputed_tokens",
    "quire_request_duration_seconds",
    "quire_requests",
    "quire_requests_received",
    "quire_requests_running",
    "quire_requests_waiting",
    "quire_time_to_first_token_seconds",
    "quire_unknown_request_fields",
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def scrape(http: object) -> dict[str, float]:
    """Every sample by name and labels."""
    reply = await http.get("/metrics")  # type: ignore[attr-defined]
    samples = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


async def test_names_follow_prometheus_own_rules() -> None:
    """What `promtool check metrics` looks at: help, units and suffixes by type, no colons."""
    async with in_process() as (http, _):
        await http.post(CHAT, json={"messages": HELLO})
        text = (await http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == EXPECTED
    typed = dict(re.findall(r"# TYPE (\S+) (\S+)", text))
    for name, kind in typed.items():
        assert re.fullmatch(r"quire_[a-z0-9_]+", name) and "__" not in name
        assert (kind == "counter") == name.endswith("_total"), name
        assert not name.endswith(("_count", "_sum", "_bucket"))
        assert f"# HELP {name} " in text
        if kind == "histogram":
            assert name.endswith("_seconds")


async def test_the_books_balance() -> None:
    client = FakeClient()
    async with in_process(client) as (http, _):
        await http.post(CHAT, json={"messages": HELLO})
        await http.post(CHAT, json={"messages": HELLO, "stream": True})
        await http.post(CHAT, json={"messages": []})
        await http.post(CHAT, json={"messages": HELLO, "model": "other"})
        client.max_in_flight = 0
        await http.post(CHAT, json={"messages": HELLO})
        client.max_in_flight = None
        client.die_after = 2
        await http.post(CHAT, json={"messages": HELLO})
        await http.post(CHAT, json={"messages": HELLO, "stream": True})
        client.die_after = None
        client.gate.clear()
        task = asyncio.create_task(http.post(COMPLETIONS, json={"prompt": "a"}))
        while not client.in_flight:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        samples = await scrape(http)
    outcomes = {name: value for name, value in samples.items() if name.startswith("quire_requests_total")}
    assert outcomes["quire_requests_total{api=chat,outcome=ok}"] == 2
    assert outcomes["quire_requests_total{api=chat,outcome=client_error}"] == 2
    assert outcomes["quire_requests_total{api=chat,outcome=shed}"] == 1
    assert outcomes["quire_requests_total{api=chat,outcome=error}"] == 2
    assert outcomes["quire_requests_total{api=completions,outcome=aborted}"] == 1
    received = sum(value for name, value in samples.items() if name.startswith("quire_requests_received"))
    assert sum(outcomes.values()) == received == 8
    assert samples["quire_http_requests_active{}"] == 1, "the scrape itself"


async def test_what_clients_send_makes_no_new_series() -> None:
    async with in_process() as (http, _):
        await http.get("/first")
        await http.post(CHAT, json={"messages": HELLO, "model": "a"})
        before = set(await scrape(http))
        for number in range(20):
            await http.get(f"/{number}")
            await http.get(f"/v1/models/{number}")
            await http.request(f"VERB{number}", "/first")
            await http.post(
                CHAT, json={"messages": HELLO, "model": str(number), "user": str(number), f"x{number}": 1}
            )
        added = set(await scrape(http)) - before
    assert len(added) <= 5, added


async def test_latencies_and_state() -> None:
    client = FakeClient()
    async with in_process(client) as (http, _):
        await http.post(CHAT, json={"messages": HELLO, "max_tokens": 5, "foo": 1})
        client.restarts = 2
        samples = await scrape(http)
        client.sickness = "stuck"
        sick = await scrape(http)
    assert samples["quire_time_to_first_token_seconds_count{}"] == 1
    assert samples["quire_inter_token_seconds_count{}"] == 4
    assert samples["quire_request_duration_seconds_count{}"] == 1
    assert samples["quire_engine_restarts_total{}"] == 2
    assert samples["quire_unknown_request_fields_total{api=chat}"] == 1
    states = [samples[f"quire_kv_blocks{{state={state}}}"] for state in ("in_use", "cached", "free")]
    assert sum(states) == samples["quire_kv_pool_blocks{}"]
    assert (samples["quire_engine_up{}"], sick["quire_engine_up{}"]) == (1, 0)


def test_a_fast_histogram_counts_like_prometheus() -> None:
    histogram = FastHistogram("x_seconds", "x", (0.1, 1))
    for value in (0.05, 0.1, 0.5, 3):
        histogram.observe(value, 2)
    samples = {(s.name, s.labels.get("le")): s.value for s in histogram.family().samples}
    assert samples["x_seconds_bucket", "0.1"] == 4
    assert samples["x_seconds_bucket", "1.0"] == 6
    assert samples["x_seconds_bucket", "+Inf"] == samples["x_seconds_count", None] == 8
    assert samples["x_seconds_sum", None] == pytest.approx(7.3)
