"""A generation request's trail as OpenTelemetry spans. The only file that imports its SDK (quire[otel]).

    chat MODEL   the request, by the names of the GenAI conventions
      queue      in the engine, before its first step
      prefill    until the first token was here
      decode     until the last one was

Knows span names and attributes; does not know HTTP or engines. Spans are made when a request has ended, from
the times that were noted, so that nothing is done per token. No text of a prompt or an answer, and nothing
else that a caller wrote, becomes an attribute.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.types import SamplingParams
from server import __version__
from server.generation import Generation
from server.trail import PromptTimes, Trail

logger = logging.getLogger("quire.tracing")

EXPORT_TIMEOUT_S = 5.0
SHUTDOWN_TIMEOUT_S = 3.0
# Of a request with many prompts, the first ones get their own spans.
MAX_PROMPTS = 16
_OPERATIONS = {"chat": "chat", "completions": "text_completion"}

Attribute = str | bool | int | float | Sequence[str]


def connect(endpoint: str) -> Tracing:
    """Sends spans to a collector, in batches, from a thread of its own.

    What else OpenTelemetry's variables say (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_*) is read by the SDK.

    Args:
        endpoint: the whole address, `/v1/traces` included.
    """
    # It would repeat for every batch what DeliveryNotes says once.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    logging.getLogger("opentelemetry.sdk._shared_internal").setLevel(logging.CRITICAL)
    exporter = OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
    return Tracing(BatchSpanProcessor(DeliveryNotes(exporter, _without_secrets(endpoint))))


class Tracing:
    """Makes spans.

    Args:
        processor: takes them.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "quire"}))
        # Ended by `shutdown`, which does not wait for ever; at exit the SDK would.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer: Tracer = self._provider.get_tracer("quire", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, trail: Trail, model: str) -> str:
        """Makes the spans of a request; returns the trace's id, "" if it is not sampled."""
        operation = _OPERATIONS.get(trail.api, trail.api)
        to_ns = _Clock(trail)
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=self._propagator.extract(trail.parents),
            kind=SpanKind.SERVER,
            # What a sampler may want to see.
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "quire",
                "gen_ai.request.model": model,
            },
            start_time=to_ns(trail.started_s),
        )
        if not span.is_recording():
            return ""
        span.set_attributes(_request_attributes(trail))
        if trail.generation is not None:
            span.set_attributes(_generation_attributes(trail, trail.generation, model))
            self._phases(span, trail, trail.generation, to_ns)
        if trail.server_failed:
            span.set_status(StatusCode.ERROR, trail.error)
        span.end(to_ns(trail.started_s + trail.seconds))
        return format_trace_id(span.get_span_context().trace_id)

    def _phases(self, parent: Span, trail: Trail, generation: Generation, to_ns: _Clock) -> None:
        submitted_s = generation.timeline.submitted_s
        if submitted_s is None:
            return
        context = set_span_in_context(parent)
        end_s = trail.started_s + trail.seconds
        for position, times in enumerate(generation.timeline.prompts[:MAX_PROMPTS]):
            about: dict[str, Attribute] = {"quire.prompt": position} if len(generation.prompts) > 1 else {}
            for name, start_s, stop_s in _phase_times(submitted_s, times, end_s):
                more = _cache_attributes(generation, position) if name == "prefill" else {}
                phase = self._tracer.start_span(
                    name, context, start_time=to_ns(start_s), attributes={**about, **more}
                )
                phase.end(to_ns(stop_s))

    def shutdown(self) -> None:
        """Sends what is left, but does not wait longer than SHUTDOWN_TIMEOUT_S for a collector."""
        ending = threading.Thread(target=self._provider.shutdown, name="end-tracing", daemon=True)
        ending.start()
        ending.join(SHUTDOWN_TIMEOUT_S)


class DeliveryNotes(SpanExporter):
    """Says once that spans do not arrive, and at the end how many did not."""

    def __init__(self, exporter: SpanExporter, place: str) -> None:
        self._exporter = exporter
        self._place = place
        self._lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception:
            logger.debug("the exporter broke", exc_info=True)
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                logger.warning(
                    "traces do not reach %s; requests are served as before, their spans are dropped",
                    self._place,
                )
            self._lost += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        if self._lost:
            logger.warning("%d spans did not reach %s", self._lost, self._place)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _Clock:
    """Monotonic seconds -> nanoseconds since 1970, from one look at both clocks."""

    def __init__(self, trail: Trail) -> None:
        self._offset_ns = int(trail.started_unix_s * 1e9) - int(trail.started_s * 1e9)

    def __call__(self, monotonic_s: float) -> int:
        return int(monotonic_s * 1e9) + self._offset_ns


def _phase_times(submitted_s: float, times: PromptTimes, end_s: float) -> list[tuple[str, float, float]]:
    """Where each phase began and ended. One that was cut off ends with the request.

    submitted      admitted          first event            last event
    |--- queue ---|---- prefill ----|------- decode -------|
    """
    if times.first_s is None:
        return [("queue", submitted_s, end_s)]
    last_s = times.last_s if times.last_s is not None else end_s
    decode = ("decode", times.first_s, max(last_s, times.first_s))
    if times.queued_s is None:
        return [("prefill", submitted_s, times.first_s), decode]
    admitted_s = min(submitted_s + times.queued_s, times.first_s)
    return [("queue", submitted_s, admitted_s), ("prefill", admitted_s, times.first_s), decode]


def _request_attributes(trail: Trail) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {
        "http.request.method": trail.method,
        "http.response.status_code": trail.status,
        "url.path": trail.path,
        "quire.request_id": trail.request_id,
    }
    if trail.tenant:
        found["quire.tenant"] = trail.tenant
    if trail.stream is not None:
        found["gen_ai.request.stream"] = trail.stream
    if trail.error or trail.status >= 400:
        found["error.type"] = trail.error or str(trail.status)
    return found


def _generation_attributes(trail: Trail, generation: Generation, model: str) -> dict[str, Attribute]:
    timeline = generation.timeline
    found = _params_attributes(generation.params)
    found |= {
        "gen_ai.response.id": generation.id,
        "gen_ai.response.model": model,
        "gen_ai.usage.input_tokens": generation.prompt_tokens,
        "gen_ai.usage.output_tokens": generation.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": generation.cached_tokens,
        "quire.cache.reused_tokens": generation.cached_tokens,
    }
    if timeline.finish_reasons:
        found["gen_ai.response.finish_reasons"] = tuple(timeline.finish_reasons)
    if timeline.first_s is not None:
        found["gen_ai.response.time_to_first_chunk"] = timeline.first_s - trail.started_s
    reasons = {report.reason for report in generation.reports if report is not None}
    if len(reasons) == 1:
        found["quire.cache.miss_reason"] = reasons.pop().value
    return found


def _params_attributes(params: SamplingParams) -> dict[str, Attribute]:
    if params.pooling is not None:
        dimensions = params.pooling.dimensions
        return {} if dimensions is None else {"gen_ai.embeddings.dimension.count": dimensions}
    found: dict[str, Attribute] = {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
    }
    if params.top_k > 0:
        found["gen_ai.request.top_k"] = params.top_k
    if params.n > 1:
        found["gen_ai.request.choice.count"] = params.n
    for name in ("frequency_penalty", "presence_penalty"):
        if value := getattr(params, name):
            found[f"gen_ai.request.{name}"] = value
    for name in ("max_tokens", "seed"):
        if (given := getattr(params, name)) is not None:
            found[f"gen_ai.request.{name}"] = given
    return found


def _cache_attributes(generation: Generation, position: int) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {"quire.cache.reused_tokens": generation.prompts_cached_tokens[position]}
    report = generation.reports[position]
    if report is not None:
        found["quire.cache.miss_reason"] = report.reason.value
    return found


def _without_secrets(endpoint: str) -> str:
    """An address may hold a password or a token."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
