"""Spans: their names, times and parents; what is in them and what is not; collectors that are away."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs quire[otel]: pip install 'quire[otel]'")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engine.errors import ConfigError
from engine.types import TokenEvent
from engine.views import CacheReport, MissReason
from server import serving, tracing
from server.settings import ServerSettings, SettingsError
from server.tracing import Tracing
from server.trail import PromptTimes, Trail
from tests.helpers.collector import attributes, collector
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, in_process
from tests.helpers.settings import parse_args

pytestmark = pytest.mark.anyio

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Spans:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self.exporter))

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.all if span.name == name]
        return found

    @property
    def root(self) -> ReadableSpan:
        (found,) = [span for span in self.all if span.kind is SpanKind.SERVER]
        return found

    @property
    def about(self) -> dict[str, Any]:
        return dict(self.root.attributes or {})


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    made = Spans()
    yield made
    made.tracing.shutdown()


class Queued(FakeClient):
    """Says that each prompt was queued for a while."""

    def _choice(self, *args: Any) -> Iterator[TokenEvent]:
        report = CacheReport(8, 3, MissReason.DIVERGED, 3)
        for event in super()._choice(*args):
            yield replace(event, queued_s=1e-6, cached_tokens=3, cache=report)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_by_the_genai_names(spans: Spans, stream: bool) -> None:
    body = {
        "messages": HELLO, "stream": stream, "max_tokens": 6, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
        "seed": 11, "n": 2, "presence_penalty": 0.25,
    }  # fmt: skip
    async with in_process(Queued(), tracer=spans.tracing) as (http, _):
        reply = await http.post(CHAT, json=body, headers={"x-request-id": "mine-1"})
    about = spans.about
    assert about.pop("gen_ai.response.id") in reply.text
    assert about.pop("gen_ai.response.time_to_first_chunk") > 0
    assert about == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": "quire-demo",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 11,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.presence_penalty": 0.25,
        "gen_ai.request.stream": stream,
        "gen_ai.response.model": "quire-demo",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": CHAT,
        "quire.request_id": "mine-1",
        "quire.tenant": "default",
        "quire.cache.reused_tokens": 3,
        "quire.cache.miss_reason": "diverged",
    }
    assert spans.root.name == "chat quire-demo" and spans.root.status.status_code is StatusCode.UNSET
    assert spans.root.resource.attributes["service.name"] == "quire"


async def test_phases_are_children_in_order(spans: Spans) -> None:
    async with in_process(Queued(), tracer=spans.tracing) as (http, _):
        await http.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 4})
    root = spans.root
    assert root.name == "text_completion quire-demo"
    phases = [spans.named(name) for name in ("queue", "prefill", "decode")]
    assert len(spans.all) == 4
    for phase in phases:
        assert phase.parent is not None and phase.parent.span_id == root.context.span_id
        assert phase.context.trace_id == root.context.trace_id
    edges = [edge or 0 for phase in phases for edge in (phase.start_time, phase.end_time)]
    times = [root.start_time or 0, *edges, root.end_time or 0]
    assert times == sorted(times), "one after the other, inside the request"
    assert phases[0].end_time == phases[1].start_time and phases[1].end_time == phases[2].start_time
    assert (phases[0].end_time or 0) - (phases[0].start_time or 0) == pytest.approx(1000, abs=500)
    assert dict(phases[1].attributes or {}) == {
        "quire.cache.reused_tokens": 3,
        "quire.cache.miss_reason": "diverged",
    }


def phases(times: PromptTimes) -> list[tuple[str, float, float]]:
    return tracing._phase_times(10.0, times, 20.0)


def test_phase_times() -> None:
    whole = [("queue", 10.0, 12.0), ("prefill", 12.0, 13.0), ("decode", 13.0, 15.0)]
    assert phases(PromptTimes(2.0, 13.0, 15.0)) == whole
    assert phases(PromptTimes(2.0, 13.0, None)) == [*whole[:2], ("decode", 13.0, 20.0)], "cut off"
    assert phases(PromptTimes(None, 13.0, 15.0)) == [("prefill", 10.0, 13.0), whole[2]], "nobody knows"
    assert phases(PromptTimes()) == [("queue", 10.0, 20.0)], "it never began"
    assert phases(PromptTimes(9.0, 13.0, 15.0))[0] == ("queue", 10.0, 13.0), "clocks differ a little"


async def test_several_prompts_have_phases_of_their_own_up_to_a_bound(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MAX_PROMPTS", 2)
    async with in_process(tracer=spans.tracing) as (http, _):
        await http.post(COMPLETIONS, json={"prompt": ["a", "b", "c"], "max_tokens": 2})
    found = sorted((span.name, (span.attributes or {}).get("quire.prompt")) for span in spans.all[:-1])
    assert found == [("decode", 0), ("decode", 1), ("prefill", 0), ("prefill", 1)]


async def test_the_callers_trace_goes_on(spans: Spans) -> None:
    async with in_process(tracer=spans.tracing) as (http, _):
        headers = {"traceparent": SAMPLED, "tracestate": "vendor=1"}
        await http.post(CHAT, json={"messages": HELLO}, headers=headers)
    context, parent = spans.root.context, spans.root.parent
    assert parent is not None and parent.is_remote
    assert f"{context.trace_id:032x}" == TRACE and f"{parent.span_id:016x}" == PARENT
    assert context.trace_state.get("vendor") == "1"


async def test_the_caller_decides_on_sampling(spans: Spans) -> None:
    async with in_process(tracer=spans.tracing) as (http, _):
        await http.post(CHAT, json={"messages": HELLO}, headers={"traceparent": NOT_SAMPLED})
    assert spans.all == []


MALFORMED = [
    "", "x", "00", SAMPLED[:-1], SAMPLED + "-1", SAMPLED.replace("00-", "ff-", 1),
    f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", SAMPLED.upper(),
    "00-" + "é" * 32 + f"-{PARENT}-01", "00-" * 5000, "\x00",
]  # fmt: skip


@pytest.mark.parametrize("sent", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_malformed_traceparent_is_ignored(spans: Spans, sent: str) -> None:
    async with in_process(tracer=spans.tracing) as (http, _):
        headers = [(b"traceparent", sent.encode("latin-1")), (b"tracestate", b"=,;" + sent.encode("latin-1"))]
        reply = await http.post(CHAT, json={"messages": HELLO}, headers=headers)
    assert reply.status_code == 200
    assert spans.root.parent is None and f"{spans.root.context.trace_id:032x}" != TRACE


async def test_two_traceparents_are_none(spans: Spans) -> None:
    async with in_process(tracer=spans.tracing) as (http, _):
        await http.post(
            CHAT, json={"messages": HELLO}, headers=[("traceparent", SAMPLED), ("traceparent", SAMPLED)]
        )
    assert spans.root.parent is None


async def test_a_refusal_is_a_span_without_phases(spans: Spans) -> None:
    engine = FakeClient()
    engine.max_in_flight = 0
    async with in_process(engine, tracer=spans.tracing) as (http, _):
        await http.post(CHAT, json={"messages": HELLO})
    assert len(spans.all) == 1 and spans.root.status.status_code is StatusCode.UNSET
    assert (spans.about["error.type"], spans.about["http.response.status_code"]) == ("queue_full", 429)


@pytest.mark.parametrize(("stream", "status"), [(True, 200), (False, 503)])
async def test_our_own_failure_is_an_error(spans: Spans, stream: bool, status: int) -> None:
    engine = FakeClient()
    engine.die_after = 2
    async with in_process(engine, tracer=spans.tracing) as (http, _):
        await http.post(CHAT, json={"messages": HELLO, "stream": stream})
    assert spans.root.status.status_code is StatusCode.ERROR
    assert (spans.about["error.type"], spans.about["http.response.status_code"]) == (
        "engine_unavailable",
        status,
    )
    assert spans.about["gen_ai.usage.output_tokens"] == 2


async def test_nothing_that_was_written_is_in_a_span(spans: Spans) -> None:
    engine = FakeClient(lambda ids, params, index: "s3cret answer")
    body = {"messages": [{"role": "user", "content": "s3cret"}], "stop": ["s3cret stop"], "user": "s3cret"}
    keys = ServerSettings(api_keys=("s3cret-key",))
    async with in_process(engine, keys, tracer=spans.tracing) as (http, _):
        for extra in ({}, {"model": "s3cret"}, {"temperature": "s3cret"}):
            headers = {"authorization": "Bearer s3cret-key"}
            await http.post(CHAT + "?key=s3cret", json=body | extra, headers=headers)
    assert len(spans.all) > 3
    assert all("s3cret" not in span.to_json() for span in spans.all)


async def test_only_generation_is_traced_and_named_in_the_log(
    spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="quire.access")
    async with in_process(tracer=spans.tracing) as (http, _):
        for path in ("/v1/models", "/health", "/metrics", "/none"):
            await http.get(path, headers={"traceparent": SAMPLED})
        assert spans.all == []
        await http.post(CHAT, json={"messages": HELLO})
    trace_id = f"{spans.root.context.trace_id:032x}"
    assert caplog.records[-1].__dict__["fields"]["trace_id"] == trace_id


# To a collector.


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "EXPORT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(tracing, "SHUTDOWN_TIMEOUT_S", 0.5)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")


def send_one(to: Tracing) -> str:
    trail = Trail("req-1", "POST", CHAT, "127.0.0.1", api="chat")
    trail.ended(200)
    return to.ended(trail, "m")


async def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "answers")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=abc")
    with collector() as there:
        chosen = parse_args(["--otlp-endpoint", there.url], {})
        tracer = tracing.connect(chosen.otlp_endpoint)
        async with in_process(Queued(), tracer=tracer) as (http, _):
            await http.post(CHAT, json={"messages": HELLO}, headers={"traceparent": SAMPLED})
        tracer.shutdown()
    by_name = {span.name: span for span in there.spans}
    assert set(by_name) == {"chat quire-demo", "queue", "prefill", "decode"}
    root = by_name["chat quire-demo"]
    assert root.trace_id.hex() == TRACE and root.parent_span_id.hex() == PARENT
    assert attributes(root)["gen_ai.usage.input_tokens"] == 8
    assert all(by_name[name].parent_span_id == root.span_id for name in ("queue", "prefill", "decode"))
    assert there.resources[0]["service.name"] == "answers" and there.headers[0]["x-token"] == "abc"


def test_a_collector_that_is_away_costs_one_warning(fast: None, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        tracer = tracing.connect(f"http://user:s3cret@127.0.0.1:{port}/v1/traces?token=s3cret")
        for _ in range(3):
            assert send_one(tracer)
            tracer._provider.force_flush()
        tracer.shutdown()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "s3cret" not in caplog.text
    assert f"do not reach http://127.0.0.1:{port}" in said[0] and said[1].startswith("3 spans did not reach")


def test_a_collector_that_hangs_does_not_hold_up_the_end(fast: None) -> None:
    with collector() as there:
        there.silent = True
        tracer = tracing.connect(f"{there.url}/v1/traces")
        send_one(tracer)
        assert there.asked.wait(20)
        tracer.shutdown()  # returns while the collector still says nothing
        assert not there.over.is_set()


# Settings.


@pytest.mark.parametrize(
    ("given", "endpoint"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://c.example/otlp", "https://c.example/otlp/v1/traces"),
        ("https://c.example/v1/traces", "https://c.example/v1/traces"),
    ],
)
def test_the_endpoint(given: str, endpoint: str) -> None:
    assert parse_args(["--otlp-endpoint", given], {}).otlp_endpoint == endpoint
    assert parse_args([], {"QUIRE_OTLP_ENDPOINT": given}).otlp_endpoint == endpoint
    ambient = parse_args([], {"OTEL_EXPORTER_OTLP_ENDPOINT": given})
    assert ambient.otlp_endpoint == endpoint and not ambient.otlp_required


def test_which_endpoint_wins() -> None:
    ambient = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}
    chosen = parse_args(["--otlp-endpoint", "http://b"], ambient)
    assert chosen.otlp_endpoint == "http://b/v1/traces" and chosen.otlp_required
    assert parse_args([], {}).otlp_endpoint == ""
    for off in ({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert parse_args([], ambient | off).otlp_endpoint == ""


@pytest.mark.parametrize(
    "given", ["collector:4317", "ftp://x", "http://", "http://[", "http://x:99999", "http://x\ny"]
)
def test_what_is_no_endpoint(given: str) -> None:
    with pytest.raises(SettingsError, match="--otlp-endpoint"):
        parse_args(["--otlp-endpoint", given], {})


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "server.tracing")
    monkeypatch.delattr("server.tracing", raising=False)
    there = ServerSettings(otlp_endpoint="http://127.0.0.1:4318/v1/traces")
    with pytest.raises(ConfigError, match=r"pip install 'quire\[otel\]'"):
        serving._tracing(there)
    assert serving._tracing(replace(there, otlp_required=False)) is None
    assert "nothing is traced" in caplog.text
    assert serving._tracing(ServerSettings()) is None


def test_only_one_file_needs_the_sdk() -> None:
    code = "import sys, server.serving; print(*[n for n in sys.modules if n.startswith('opentelemetry.sdk')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == ""
