"""Metric names, labels and the books: what Prometheus sees is regular, bounded, documented and adds up."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import ContextTooLong, Draining, EngineDead, InvalidRequest, NeverFits, RequestFailed
from engine.stats import BUCKETS, SECONDS
from engine.types import EngineSnapshot, FinishReason
from engine.views import WHATIF_SIZES, EvictionCause, HistogramData, MissReason, TenantUse
from server.errors import ApiError
from server.metrics import REFUSALS, WHATIF_KEYS, Metrics
from server.metrics.records import Records, refusal
from server.settings import ServerSettings
from tests.helpers.fake_client import INFO, FakeClient
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, in_process
from tests.helpers.settings import parse_args

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).resolve().parents[2] / "docs/metrics.md"

GAUGES = {
    "quire_engine_up": "",
    "quire_http_requests_active": "",
    "quire_kv_block_size_tokens": "",
    "quire_kv_blocks": "state",
    "quire_kv_blocks_shared": "",
    "quire_kv_cached_tokens": "",
    "quire_kv_fill_ratio": "",
    "quire_kv_ghost_blocks": "",
    "quire_kv_pool_blocks": "",
    "quire_kv_tokens_held": "",
    "quire_kv_usage_ratio": "",
    "quire_kv_wasted_tokens": "",
    "quire_memory_bytes": "use",
    "quire_requests_running": "",
    "quire_requests_waiting": "",
    "quire_tenant_kv_blocks": "tenant state",
    "quire_tenant_requests": "tenant phase",
    "quire_build_info": "version model architecture dtype kv_dtype device backend",
    "quire_config_info": "block_size num_blocks max_model_len max_num_seqs max_num_batched_tokens "
    "prefix_caching cache_isolation",
}
COUNTERS = {
    "quire_engine_busy_seconds": "",
    "quire_engine_requests_finished": "reason",
    "quire_engine_restarts": "",
    "quire_engine_step_runs": "how reason",
    "quire_engine_steps": "",
    "quire_generated_tokens": "",
    "quire_http_requests": "method route status",
    "quire_kv_allocated_blocks": "",
    "quire_kv_evicted_blocks": "cause",
    "quire_kv_reused_blocks": "",
    "quire_preemptions": "",
    "quire_prefix_hit_tokens": "",
    "quire_prefix_hits": "",
    "quire_prefix_miss_tokens": "reason",
    "quire_prefix_misses": "reason",
    "quire_prefix_queries": "",
    "quire_prefix_query_tokens": "",
    "quire_prompt_tokens": "",
    "quire_recomputed_tokens": "",
    "quire_requests": "api outcome",
    "quire_requests_received": "api",
    "quire_requests_refused": "reason",
    "quire_tenant_generated_tokens": "tenant",
    "quire_tenant_hit_tokens": "tenant",
    "quire_tenant_prompt_tokens": "tenant",
    "quire_tenant_requests_admitted": "tenant",
    "quire_unknown_request_fields": "api",
    "quire_whatif_hit_tokens": "pool",
}
HISTOGRAMS = {
    "quire_engine_step_seconds",
    "quire_engine_step_sequences",
    "quire_engine_step_tokens",
    "quire_inter_token_seconds",
    "quire_kv_block_age_at_eviction_seconds",
    "quire_kv_block_idle_before_eviction_seconds",
    "quire_kv_block_idle_before_reuse_seconds",
    "quire_prefix_hit_ratio",
    "quire_request_decode_seconds",
    "quire_request_duration_seconds",
    "quire_request_prefill_seconds",
    "quire_request_queue_seconds",
    "quire_time_to_first_token_seconds",
}
NATIVE = {
    **{name: ("gauge", frozenset(labels.split())) for name, labels in GAUGES.items()},
    **{f"{name}_total": ("counter", frozenset(labels.split())) for name, labels in COUNTERS.items()},
    **{name: ("histogram", frozenset()) for name in HISTOGRAMS},
}

# Each number its own, so that no two can be mixed up.
BUSY = EngineSnapshot(
    steps=11,
    step_runs={"graph decode": 6, "eager prompt": 3, "forward_graph grammar": 2},
    running=3,
    waiting=2,
    blocks_total=512,
    blocks_in_use=100,
    blocks_shared=7,
    blocks_cached=212,
    blocks_free=200,
    tokens_held=1200,
    cached_tokens=3392,
    allocated_blocks=812,
    reused_blocks=61,
    evicted_blocks={"capacity": 40, "reset": 5},
    prefix_queries=31,
    prefix_hits=19,
    prefix_query_tokens=9000,
    prefix_hit_tokens=4000,
    misses={"evicted": 6, "diverged": 9},
    miss_tokens={"evicted": 1500, "diverged": 3500},
    whatif_hit_tokens={"0.5": 3001, "1": 4002, "2": 5003, "4": 6004, "8": 7005},
    ghosts=333,
    preemptions=4,
    recomputed_tokens=640,
    prompt_tokens=9100,
    generated_tokens=2222,
    busy_s=12.5,
    requests_finished={"stop": 20, "length": 8},
    histograms={
        name: HistogramData(tuple(range(1, len(bounds) + 2)), 55.5 + n)
        for n, (name, bounds) in enumerate(BUCKETS.items())
    },
    tenants={
        "key-1": TenantUse(90, 200, 3, 1, 25, 8000, 3900, 2000),
        "key-2": TenantUse(10, 12, 0, 1, 6, 1100, 100, 222),
    },
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Scripted(FakeClient):
    """Says what it is told to; `asked` counts its snapshots."""

    def __init__(self, said: EngineSnapshot = BUSY) -> None:
        super().__init__()
        self.said = said
        self.asked = 0

    def snapshot(self) -> EngineSnapshot:
        self.asked += 1
        return self.said


def started(client: FakeClient, **kwargs: object) -> Metrics:
    metrics = Metrics(client, "model-x", **kwargs)  # type: ignore[arg-type]
    metrics.engine_started()
    return metrics


def parsed(text: str) -> dict[str, float]:
    """Every sample by name and labels."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


def scraped(metrics: Metrics) -> dict[str, float]:
    return parsed(metrics.text().decode())


async def scrape(http: object) -> dict[str, float]:
    return parsed((await http.get("/metrics")).text)  # type: ignore[attr-defined]


def shapes(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """(type, labels) by name as written; a histogram's `le` is not a label of its own."""
    labels: dict[str, set[str]] = {}
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.M))
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, given = re.match(r"([^{ ]+)(?:\{(.*)\})? ", line).groups()  # type: ignore[union-attr]
        family = name if name in types else re.sub(r"_(bucket|sum|count)$", "", name)
        labels.setdefault(family, set()).update(re.findall(r'(\w+)="', given or ""))
    assert set(labels) == set(types)
    return {name: (kind, frozenset(labels[name] - {"le"})) for name, kind in types.items()}


def with_requests(metrics: Metrics) -> Metrics:
    metrics.http["GET", "/metrics", 200] += 1
    return metrics


def test_every_name_has_its_type_and_labels() -> None:
    assert shapes(with_requests(started(Scripted())).text().decode()) == NATIVE


def test_every_series_is_there_before_anything_happens() -> None:
    """Prometheus' rate() does not see the step from no series to 1."""
    silent, busy = Metrics(Scripted(), tenants=("key-1", "key-2")), started(Scripted())
    assert {re.sub(r"\{.*", "", name) for name in scraped(silent)} == {
        re.sub(r"\{.*", "", name) for name in scraped(busy)
    }
    empty = started(Scripted(EngineSnapshot()), tenants=("key-1", "key-2"))
    assert set(scraped(empty)) == set(scraped(busy))
    for name, values in (
        ("quire_prefix_misses_total{reason=%s}", MissReason),
        ("quire_prefix_miss_tokens_total{reason=%s}", MissReason),
        ("quire_kv_evicted_blocks_total{cause=%s}", EvictionCause),
        ("quire_engine_requests_finished_total{reason=%s}", FinishReason),
        ("quire_whatif_hit_tokens_total{pool=%s}", WHATIF_KEYS),
        ("quire_requests_refused_total{reason=%s}", REFUSALS),
    ):
        for value in values:
            assert scraped(empty)[name % value] == 0
    assert WHATIF_KEYS == ("0.5", "1", "2", "4", "8") and len(WHATIF_SIZES) == 5


def test_prometheus_own_checker_finds_nothing() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    metrics = with_requests(started(Scripted()))
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=metrics.text(), capture_output=True, timeout=60
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_what_the_engine_says_is_what_prometheus_sees() -> None:
    samples = scraped(started(Scripted(), cache_isolation=True))
    expected = {
        "quire_engine_steps_total{}": 11,
        "quire_requests_running{}": 3,
        "quire_requests_waiting{}": 2,
        "quire_kv_pool_blocks{}": 512,
        "quire_kv_blocks{state=in_use}": 100,
        "quire_kv_blocks{state=cached}": 212,
        "quire_kv_blocks{state=free}": 200,
        "quire_kv_blocks_shared{}": 7,
        "quire_kv_block_size_tokens{}": 16,
        "quire_kv_usage_ratio{}": 100 / 512,
        "quire_kv_tokens_held{}": 1200,
        "quire_kv_cached_tokens{}": 3392,
        "quire_kv_fill_ratio{}": 0.75,
        "quire_kv_wasted_tokens{}": 400,
        "quire_kv_ghost_blocks{}": 333,
        "quire_kv_allocated_blocks_total{}": 812,
        "quire_kv_reused_blocks_total{}": 61,
        "quire_kv_evicted_blocks_total{cause=capacity}": 40,
        "quire_kv_evicted_blocks_total{cause=reset}": 5,
        "quire_kv_evicted_blocks_total{cause=reclaimed}": 0,
        "quire_prefix_queries_total{}": 31,
        "quire_prefix_hits_total{}": 19,
        "quire_prefix_query_tokens_total{}": 9000,
        "quire_prefix_hit_tokens_total{}": 4000,
        "quire_prefix_misses_total{reason=evicted}": 6,
        "quire_prefix_miss_tokens_total{reason=diverged}": 3500,
        "quire_whatif_hit_tokens_total{pool=0.5}": 3001,
        "quire_whatif_hit_tokens_total{pool=8}": 7005,
        "quire_preemptions_total{}": 4,
        "quire_recomputed_tokens_total{}": 640,
        "quire_prompt_tokens_total{}": 9100,
        "quire_generated_tokens_total{}": 2222,
        "quire_engine_busy_seconds_total{}": 12.5,
        "quire_engine_requests_finished_total{reason=length}": 8,
        "quire_engine_step_runs_total{how=graph,reason=decode}": 6,
        "quire_engine_step_runs_total{how=eager,reason=prompt}": 3,
        "quire_engine_step_runs_total{how=eager,reason=off}": 0,
        "quire_tenant_kv_blocks{state=in_use,tenant=key-1}": 90,
        "quire_tenant_kv_blocks{state=cached,tenant=key-2}": 12,
        "quire_tenant_requests{phase=running,tenant=key-1}": 3,
        "quire_tenant_requests{phase=waiting,tenant=key-2}": 1,
        "quire_tenant_requests_admitted_total{tenant=key-1}": 25,
        "quire_tenant_prompt_tokens_total{tenant=key-1}": 8000,
        "quire_tenant_hit_tokens_total{tenant=key-2}": 100,
        "quire_tenant_generated_tokens_total{tenant=key-2}": 222,
        "quire_memory_bytes{use=weights}": INFO.weight_bytes,
        "quire_memory_bytes{use=kv_pool}": INFO.kv_bytes,
    }
    assert {name: samples[name] for name in expected} == expected
    config = next(name for name in samples if name.startswith("quire_config_info"))
    assert "cache_isolation=true" in config and "num_blocks=512" in config and "prefix_caching=true" in config
    build = next(name for name in samples if name.startswith("quire_build_info"))
    assert "model=model-x" in build and "backend=fake" in build


def test_one_scrape_is_of_one_moment() -> None:
    class Moving(Scripted):
        def snapshot(self) -> EngineSnapshot:
            super().snapshot()
            return replace(BUSY, blocks_in_use=100 + self.asked, blocks_free=200 - self.asked)

    client = Moving()
    metrics = started(client, compat="vllm")
    for scrapes in range(1, 4):
        samples = scraped(metrics)
        states = [samples[f"quire_kv_blocks{{state={state}}}"] for state in ("in_use", "cached", "free")]
        assert sum(states) == samples["quire_kv_pool_blocks{}"]
        assert client.asked == scrapes


def test_an_engine_that_died_holds_nothing_and_keeps_its_counts() -> None:
    client = Scripted()
    metrics = started(client)
    before = scraped(metrics)
    client.sickness = "dead"
    after = scraped(metrics)
    assert set(after) == set(before)
    assert after["quire_engine_up{}"] == 0
    for name in ("quire_requests_running{}", "quire_requests_waiting{}", "quire_kv_tokens_held{}"):
        assert before[name] > after[name] == 0
    assert after["quire_kv_blocks{state=free}"] == after["quire_kv_pool_blocks{}"] == 512
    assert after["quire_tenant_kv_blocks{state=in_use,tenant=key-1}"] == 0
    counts = [name for name in before if name.split("{")[0].endswith("_total")]
    assert [before[name] for name in counts] == [after[name] for name in counts]


def test_a_new_engines_counters_start_together_and_the_servers_go_on() -> None:
    client = Scripted()
    metrics = started(client)
    metrics.begin("chat").ended("ok")
    client.said, client.restarts = EngineSnapshot(blocks_total=512, blocks_free=512), 1
    samples = scraped(metrics)
    own = ("quire_requests", "quire_engine_restarts", "quire_unknown", "quire_http")
    engine = [n for n in samples if n.split("{")[0].endswith("_total") and not n.startswith(own)]
    assert len(engine) > 40 and {samples[name] for name in engine if "tenant" not in name} == {0}
    assert samples["quire_requests_total{api=chat,outcome=ok}"] == 1
    assert samples["quire_engine_restarts_total{}"] == 1


def histograms(text: str) -> Iterator[tuple[str, list[float], dict[str, float]]]:
    """(name, bounds, {bound: count, "count": ..., "sum": ...})"""
    for family in text_string_to_metric_families(text):
        if family.type == "histogram":
            buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
            rest = {s.name.rsplit("_", 1)[1]: s.value for s in family.samples if "le" not in s.labels}
            yield family.name, [float(le) for le in buckets], {**buckets, **rest}


def test_histograms_are_consistent() -> None:
    metrics = started(Scripted(), compat="vllm")
    record = metrics.begin("chat")
    record.tokens(0, 1)
    record.tokens(0, 3)
    record.ended("ok")
    seen = 0
    for name, bounds, values in histograms(metrics.text().decode()):
        seen += 1
        assert bounds == sorted(set(bounds)) and bounds[-1] == float("inf"), name
        counts = [value for le, value in values.items() if le not in ("count", "sum")]
        assert counts == sorted(counts) and counts[-1] == values["count"], name
    assert seen == 13 + 10
    by_name = {name: (bounds, values) for name, bounds, values in histograms(metrics.text().decode())}
    for name in by_name:
        if "_token_" in name or "request_" in name:
            assert (by_name[name][0][0], by_name[name][0][-2]) == (0.001, 600.0), name
    bounds, values = by_name["quire_engine_step_tokens"]
    assert bounds[:-1] == list(BUCKETS["step_tokens"])
    # BUSY has 1, 2, 3, ... in the buckets.
    assert (values["1.0"], values["2.0"], values["count"]) == (1, 3, sum(range(1, len(bounds) + 1)))
    assert values["sum"] == 55.5 + list(BUCKETS).index("step_tokens")
    assert by_name["quire_inter_token_seconds"][1]["count"] == 3
    assert by_name["quire_time_to_first_token_seconds"][0][:-1] == list(SECONDS)


def test_memory_is_read_where_it_can_be() -> None:
    client = Scripted()
    assert "quire_memory_bytes{use=engine_resident}" not in scraped(started(client))
    client.engine_pid = os.getpid()  # type: ignore[attr-defined]
    samples = scraped(started(client))
    if Path("/proc/self/statm").exists():
        assert samples["quire_memory_bytes{use=engine_resident}"] > 2**20
        assert samples["quire_memory_bytes{use=server_resident}"] > 2**20
    client.engine_pid = 2**22 + 1  # type: ignore[attr-defined]
    assert "quire_memory_bytes{use=engine_resident}" not in scraped(started(client))


@pytest.mark.parametrize(
    ("exc", "reason"),
    [
        (Draining("x"), "draining"),
        (EngineDead("x"), "engine_down"),
        (ContextTooLong("x"), "too_long"),
        (NeverFits("x"), "never_fits"),
        (InvalidRequest("x"), "invalid"),
        (ApiError(404, "x", code="model_not_found"), "invalid"),
        (ApiError(413, "x"), "invalid"),
        (ApiError(503, "x", code="loading"), "loading"),
        (ApiError(503, "x", code="shutting_down"), "draining"),
        (ApiError(503, "x", code="engine_unavailable"), "engine_down"),
        (ApiError(500, "x"), None),
        (RequestFailed("x"), None),
        (asyncio.CancelledError(), None),
        (ValueError("x"), None),
    ],
)
def test_what_is_a_refusal(exc: BaseException, reason: str | None) -> None:
    assert refusal(exc) == reason
    records = Records()
    records.begin("chat").failed(exc)
    assert dict(records.refused) == ({reason: 1} if reason else {})


async def test_refusals_are_counted_by_reason() -> None:
    client = FakeClient()
    loading = FakeClient()
    loading.start_gate.clear()
    async with in_process(loading, wait=False) as (http, _):
        await http.post(CHAT, json={"messages": HELLO})
        assert (await scrape(http))["quire_requests_refused_total{reason=loading}"] == 1
        assert (await scrape(http))["quire_engine_up{}"] == 0
        loading.start_gate.set()
    async with in_process(client) as (http, _):
        await http.post(CHAT, json={"messages": HELLO})
        await http.post(CHAT, json={"messages": []})
        await http.post(COMPLETIONS, json={"prompt": [65] * 5000})
        await http.post(COMPLETIONS, json={"prompt": [65] * 10, "max_tokens": 3000})
        client.max_in_flight = 0
        await http.post(CHAT, json={"messages": HELLO})
        client.max_in_flight = None
        client.die_after = 1
        await http.post(CHAT, json={"messages": HELLO})  # not refused: it was at work
        client.die_after = None
        client.sickness = "dead"
        await http.post(CHAT, json={"messages": HELLO})
        client.sickness = None
        http._transport.app.state.service.drain()
        assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 503
        await http.get("/v1/models")
        samples = await scrape(http)
    refused = {reason: samples[f"quire_requests_refused_total{{reason={reason}}}"] for reason in REFUSALS}
    once = ("invalid", "too_long", "never_fits", "queue_full", "engine_down", "draining")
    assert refused == {reason: int(reason in once) for reason in REFUSALS}


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
                CHAT,
                json={
                    "messages": HELLO,
                    "model": str(number),
                    "user": str(number),
                    "cache_salt": str(number),
                    f"x{number}": 1,
                },
                headers={"authorization": f"Bearer {number}", "x-request-id": str(number)},
            )
        added = set(await scrape(http)) - before
    assert len(added) <= 5, added
    assert all(name.startswith("quire_http_requests_total") for name in added)


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
    assert sum(states) == samples["quire_kv_pool_blocks{}"] == 512
    assert (samples["quire_engine_up{}"], sick["quire_engine_up{}"]) == (1, 0)


async def test_vllms_names_are_there_when_asked_for() -> None:
    plain, asked = ServerSettings(), parse_args(["--metrics-compat", "vllm"], {})
    async with in_process(settings=plain) as (http, _):
        assert "vllm:" not in (await http.get("/metrics")).text
    async with in_process(settings=asked) as (http, _):
        assert (
            f'vllm:num_requests_running{{engine="0",model_name="{asked.model_name}"}} 0'
            in (await http.get("/metrics")).text
        )
    assert parse_args([], {"QUIRE_METRICS_COMPAT": "vllm"}).metrics_compat == "vllm"


def test_vllms_names_say_what_vllms_say() -> None:
    metrics = started(Scripted(), compat="vllm")
    metrics.refused["queue_full"] += 6
    samples = {}
    for name, value in scraped(metrics).items():
        if name.startswith("vllm:"):
            assert "engine=0" in name and "model_name=model-x" in name
            short = re.sub(r",?(engine=0|model_name=model-x)", "", name.removeprefix("vllm:"))
            samples[short.replace("{,", "{")] = value
    expected = {
        "num_requests_running{}": 3,
        "num_requests_waiting{}": 2,
        "num_requests_waiting_by_reason{reason=capacity}": 2,
        "num_requests_waiting_by_reason{reason=deferred}": 0,
        "kv_cache_usage_perc{}": 100 / 512,
        "prefix_cache_queries_total{}": 9000,
        "prefix_cache_hits_total{}": 4000,
        "num_preemptions_total{}": 4,
        "prompt_tokens_total{}": 9100,
        "prompt_tokens_cached_total{}": 4000,
        "prompt_tokens_by_source_total{source=local_compute}": 5100,
        "prompt_tokens_by_source_total{source=local_cache_hit}": 4000,
        "generation_tokens_total{}": 2222,
        "request_success_total{finished_reason=stop}": 20,
        "request_success_total{finished_reason=abort}": 0,
        "admission_rejections_total{reason=max_num_queued_reqs}": 6,
        "iteration_tokens_total_count{}": sum(range(1, 18)),
    }
    assert {name: samples[name] for name in expected} == expected
    (config,) = [name for name in samples if name.startswith("cache_config_info")]
    assert "block_size=16" in config and "num_gpu_blocks=513" in config


def documented() -> Mapping[str, tuple[str, frozenset[str]]]:
    """(type, labels) by name, as in the tables of docs/metrics.md."""
    rows = re.findall(
        r"^\| `((?:quire_|vllm:)\w+)` \| (\w+) \| *([^|]*?) *\| [^|]+ \|", DOCS.read_text(), flags=re.M
    )
    assert len(rows) == len({name for name, _, _ in rows})
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_docs_and_metrics_say_the_same() -> None:
    exposed = shapes(with_requests(started(Scripted(), compat="vllm")).text().decode())
    for name, (kind, labels) in exposed.items():
        if name.startswith("vllm:"):
            assert {"model_name", "engine"} <= labels
            exposed[name] = (kind, labels - {"model_name", "engine"})
    assert documented() == exposed


def test_docs_name_every_value_of_every_reason() -> None:
    text = DOCS.read_text()
    values = [*MissReason, *EvictionCause, *FinishReason, *REFUSALS]
    assert [value for value in values if f"`{value}`" not in text] == []


def test_the_names_in_the_docs_queries_exist() -> None:
    known = set(documented())
    histogram = {f"{name}{end}" for name in HISTOGRAMS for end in ("_bucket", "_sum", "_count")}
    mentioned = set(re.findall(r"(?:quire_|vllm:)[a-z0-9_]+", DOCS.read_text()))
    assert mentioned - known - histogram == {"vllm:request_inference_time_seconds"}


def test_a_scrape_is_cheap(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints; a shared machine proves no times."""
    for compat in ("none", "vllm"):
        metrics = with_requests(started(Scripted(), compat=compat))
        started_s = time.perf_counter()
        for _ in range(10):
            text = metrics.text()
        scrape_ms = (time.perf_counter() - started_s) * 100
        with capsys.disabled():
            print(f"\n  scrape, compat {compat}: {scrape_ms:.1f} ms, {len(text)} bytes", end="")
