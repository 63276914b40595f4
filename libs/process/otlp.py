"""Pushing traces and metrics to an OpenTelemetry collector over HTTP."""

import threading
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

import requests
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

PUSH_INTERVAL_SECONDS = 15.0
PUSH_TIMEOUT_SECONDS = 5

_SCOPE = InstrumentationScope("datasync")
Labels = tuple[tuple[str, str], ...]


def push_traces(service: str, endpoint: str) -> trace.Tracer:
    """Send every span to ``endpoint``/v1/traces, in batches; spans that can't be sent are dropped."""
    provider = TracerProvider(resource=_resource(service))
    exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=PUSH_TIMEOUT_SECONDS, session=_session_to(endpoint))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.get_tracer("datasync")


def push_metrics(service: str, endpoint: str, registry: CollectorRegistry) -> None:
    """Send the registry to ``endpoint``/v1/metrics every 15 seconds, from a thread that ends with the process."""
    exporter = OTLPMetricExporter(f"{endpoint}/v1/metrics", timeout=PUSH_TIMEOUT_SECONDS, session=_session_to(endpoint))
    resource = _resource(service)
    started_at_ns = time.time_ns()

    def push() -> None:
        while True:
            time.sleep(PUSH_INTERVAL_SECONDS)
            exporter.export(metrics_data(registry.collect(), resource, started_at_ns, time.time_ns()))

    threading.Thread(target=push, name="otlp-metrics", daemon=True).start()


def _session_to(endpoint: str) -> requests.Session:
    """A session that uses the environment's proxy, but not for a collector on this machine."""
    session = requests.Session()
    host = urlsplit(endpoint).hostname or ""
    session.trust_env = not (host == "localhost" or host.startswith("127.") or host == "::1")
    return session


def metrics_data(families: Iterable[Family], resource: Resource, started_at_ns: int, now_ns: int) -> MetricsData:
    """Prometheus families as OpenTelemetry metrics with cumulative points."""
    metrics = [_metric(family, started_at_ns, now_ns) for family in families if family.samples]
    scope = ScopeMetrics(_SCOPE, metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _resource(service: str) -> Resource:
    return Resource.create({"service.name": f"datasync-{service}", "service.namespace": "datasync"})


def _metric(family: Family, started_at_ns: int, now_ns: int) -> Metric:
    unit = "s" if family.name.endswith("_seconds") else "By" if family.name.endswith("_bytes") else "1"
    match family.type:
        case "histogram":
            data: Histogram | Sum | Gauge = Histogram(
                [_histogram_point(labels, samples, started_at_ns, now_ns) for labels, samples in _series(family)],
                AggregationTemporality.CUMULATIVE,
            )
        case "counter":
            counted = [sample for sample in family.samples if sample.name.endswith("_total")]
            points = [_number_point(sample, started_at_ns, now_ns) for sample in counted]
            data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
        case _:
            data = Gauge([_number_point(sample, started_at_ns, now_ns) for sample in family.samples])
    return Metric(family.name, family.documentation, unit, data)


def _number_point(sample: Sample, started_at_ns: int, now_ns: int) -> NumberDataPoint:
    return NumberDataPoint(dict(sample.labels), started_at_ns, now_ns, sample.value)


def _series(family: Family) -> Iterable[tuple[Labels, list[Sample]]]:
    series: dict[Labels, list[Sample]] = {}
    for sample in family.samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        series.setdefault(labels, []).append(sample)
    return series.items()


def _histogram_point(labels: Labels, samples: list[Sample], started_at_ns: int, now_ns: int) -> HistogramDataPoint:
    cumulative = [(float(sample.labels["le"]), sample.value) for sample in samples if sample.name.endswith("_bucket")]
    cumulative.sort()
    counts = [value for _, value in cumulative]
    return HistogramDataPoint(
        attributes=dict(labels),
        start_time_unix_nano=started_at_ns,
        time_unix_nano=now_ns,
        count=int(counts[-1]),
        sum=sum(sample.value for sample in samples if sample.name.endswith("_sum")),
        bucket_counts=[int(now - before) for now, before in zip(counts, [0.0, *counts[:-1]], strict=True)],
        explicit_bounds=[bound for bound, _ in cumulative[:-1]],
        min=0.0,
        max=0.0,
    )
