"""Traces and metrics: W3C trace context is propagated, every metric is in one registry, both are exported over OTLP.

Spans are recorded only if a collector is configured. Without one, a trace context is still created, bound to the logs
and propagated, which costs a microsecond per request. prometheus_client keeps the metrics, since an observation costs a
tenth of the OpenTelemetry SDK's (0.7 µs); ``/metrics`` and OTLP both read its registry.
"""

import random
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.propagate import inject
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from libs.process.settings import ServiceSettings

# W3C Trace Context, section 3.2: version 00 or a later one that begins alike; ids of zeros only are not valid.
_TRACEPARENT = re.compile(
    r"(?:00(?=.{53}$)|(?!00|ff)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

_LATENCY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

HTTP_REQUESTS = Histogram(
    "datasync_http_server_request_duration_seconds",
    "Time from the request's head to the response's end",
    ["method", "route", "status_class"],
    buckets=_LATENCY_SECONDS,
    registry=REGISTRY,
)
HTTP_IN_FLIGHT = Gauge("datasync_http_server_requests_in_flight", "Requests being answered", registry=REGISTRY)


class InFlight:
    """Counts without the gauge's lock, which each request would take twice; the gauge reads the count on collection."""

    def __init__(self, gauge: Gauge) -> None:
        self._count = 0
        gauge.set_function(lambda: self._count)

    def add(self) -> None:
        self._count += 1

    def remove(self) -> None:
        self._count -= 1


IN_FLIGHT = InFlight(HTTP_IN_FLIGHT)
INTERNAL_CALLS = Histogram(
    "datasync_internal_call_duration_seconds",
    "Time of a call to another service",
    ["service", "path", "outcome"],
    buckets=_LATENCY_SECONDS,
    registry=REGISTRY,
)
UPSTREAM_UNAVAILABLE = Counter(
    "datasync_gateway_upstream_unavailable_total",
    "Requests refused because their service could not be reached",
    ["service"],
    registry=REGISTRY,
)
RATE_LIMITED = Counter(
    "datasync_gateway_rate_limited_total",
    "Requests refused because their caller had used up a limit",
    ["policy"],
    registry=REGISTRY,
)
RATE_LIMITS_LOCAL = Gauge(
    "datasync_gateway_rate_limits_local",
    "1 while this gateway limits by itself because the store does not answer",
    registry=REGISTRY,
)
COMMANDS = Counter("datasync_commands_total", "Commands by outcome", ["outcome"], registry=REGISTRY)
BATCH_COMMANDS = Histogram(
    "datasync_batch_commands",
    "Commands that were committed together",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 400),
    registry=REGISTRY,
)
COMMIT_SECONDS = Histogram(
    "datasync_batch_commit_duration_seconds",
    "Time of a batch from its start to its durable commit",
    buckets=_LATENCY_SECONDS,
    registry=REGISTRY,
)
COMMANDS_WAITING = Gauge("datasync_commands_waiting", "Commands that wait for a batch", registry=REGISTRY)
RELAY_LAG_EVENTS = Gauge("datasync_relay_lag_events", "Committed events that are not yet on the log", registry=REGISTRY)
RELAY_STOPPED = Gauge("datasync_relay_stopped", "1 while the relay waits for an operator's repair", registry=REGISTRY)
CONSUMER_LAG_SECONDS = Gauge(
    "datasync_consumer_lag_seconds",
    "Age of the last event applied, at the moment that it was",
    ["topic"],
    registry=REGISTRY,
)
CONSUMER_PARKED = Gauge(
    "datasync_consumer_parked_messages", "Messages that could not be handled", ["topic"], registry=REGISTRY
)
CONSUMER_PASSED_OVER = Gauge(
    "datasync_consumer_passed_over_messages",
    "Messages that wait for a newer version of the service",
    ["topic"],
    registry=REGISTRY,
)
CONSUMER_LAG_MESSAGES = Gauge(
    "datasync_consumer_lag_messages", "Messages of a topic that are not yet handled", ["topic"], registry=REGISTRY
)
CONSUMER_STOPPED = Gauge(
    "datasync_consumer_stopped", "1 while a topic waits for an operator's repair", ["topic"], registry=REGISTRY
)
RUNS_WAITING = Gauge("datasync_runs_waiting", "Runs that no worker has claimed yet", registry=REGISTRY)
OLDEST_WAIT_SECONDS = Gauge(
    "datasync_runs_oldest_wait_seconds", "How long the oldest waiting run has waited", registry=REGISTRY
)
RUNS_ACTIVE = Gauge("datasync_runs_active", "Runs that wait or are running", registry=REGISTRY)
RUNS_FINISHED = Counter("datasync_runs_finished_total", "Runs by outcome", ["outcome"], registry=REGISTRY)
WORK_RUNNING = Gauge("datasync_work_running", "Claimed work that this worker executes", ["kind"], registry=REGISTRY)
WORK_ENDED = Counter(
    "datasync_work_ended_total", "Work that this worker executed", ["kind", "outcome"], registry=REGISTRY
)

_PROPAGATOR = TraceContextTextMapPropagator()


class _Tracing:
    """The tracer; None without a collector."""

    tracer: trace.Tracer | None = None


def configure_telemetry(service: str, settings: ServiceSettings) -> None:
    """Export traces and metrics to ``otlp_endpoint``, if it is set."""
    if settings.otlp_endpoint is None:
        return
    # The exporters are imported only where they are used: they cost 5 MB and 0.2 s a process.
    from libs.process.otlp import push_metrics, push_traces  # noqa: PLC0415

    endpoint = settings.otlp_endpoint.rstrip("/")
    _Tracing.tracer = push_traces(service, endpoint)
    push_metrics(service, endpoint, REGISTRY)


def metrics_page() -> bytes:
    """The metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)


def server_span(name: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
    """The span of an incoming request, a child of the caller's span if it sent one."""
    return _span(name, headers, SpanKind.SERVER)


def consumer_span(name: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
    """The span of handling a message from the event log."""
    return _span(name, headers, SpanKind.CONSUMER)


@contextmanager
def client_span(name: str) -> Iterator[Span]:
    """The span of a call to another service; free without a collector."""
    if _Tracing.tracer is None:
        yield trace.get_current_span()
        return
    with _Tracing.tracer.start_as_current_span(name, kind=SpanKind.CLIENT) as span:
        yield span


def inject_trace(headers: MutableMapping[str, str]) -> None:
    """Add ``traceparent`` (and ``tracestate``) of the current span to outgoing headers."""
    if _Tracing.tracer is not None:
        inject(headers)
    elif (traceparent := current_traceparent()) is not None:
        headers["traceparent"] = traceparent


def current_traceparent() -> str | None:
    """The current span as W3C Trace Context, None outside any."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def fail_span(span: Span, reason: str) -> None:
    """Mark a span as failed."""
    if span.is_recording():
        span.set_status(StatusCode.ERROR, reason)


def _span(name: str, headers: Mapping[str, str], kind: SpanKind) -> AbstractContextManager[Span]:
    traceparent = headers.get("traceparent")
    if _Tracing.tracer is None:
        return _Unrecorded(_span_context(traceparent))
    parent = _PROPAGATOR.extract(headers) if traceparent is not None else otel_context.Context()
    return _Tracing.tracer.start_as_current_span(name, context=parent, kind=kind)


class _Unrecorded:
    """Makes a trace context current."""

    __slots__ = ("_span", "_token")

    def __init__(self, context: SpanContext) -> None:
        self._span = NonRecordingSpan(context)

    def __enter__(self) -> Span:
        self._token = otel_context.attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(self, *_: object) -> None:
        otel_context.detach(self._token)


def _span_context(traceparent: str | None) -> SpanContext:
    """The caller's span, or a new one. OpenTelemetry's propagator would take five times as long."""
    given = None if traceparent is None else _TRACEPARENT.fullmatch(traceparent)
    if given is None:
        return SpanContext(random.getrandbits(128) | 1, random.getrandbits(64) | 1, False, TraceFlags(0))
    trace_id, span_id, flags = given.groups()
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)))
