"""What a collector gets: spans under the caller's trace, and every metric of the registry."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from libs.process import telemetry
from libs.process.otlp import metrics_data


class Collector:
    """Keeps what is pushed to it."""

    def __init__(self) -> None:
        self.url = ""
        self.metrics = ExportMetricsServiceRequest()
        self.traces = ExportTraceServiceRequest()

    async def take_metrics(self, request: web.Request) -> web.Response:
        self.metrics.ParseFromString(await request.read())
        return web.Response()

    async def take_traces(self, request: web.Request) -> web.Response:
        self.traces.ParseFromString(await request.read())
        return web.Response()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    found = Collector()
    app = web.Application()
    app.add_routes([web.post("/v1/metrics", found.take_metrics), web.post("/v1/traces", found.take_traces)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


async def test_metrics_arrive_with_their_kind_labels_and_unit(collector: Collector) -> None:
    registry = CollectorRegistry()
    Counter("made_total", "Made", ["kind"], registry=registry).labels("source").inc(3)
    Gauge("waiting", "Waiting", registry=registry).set(7)
    took = Histogram("took_seconds", "Took", buckets=(0.1, 1), registry=registry)
    for seconds in (0.05, 0.5, 0.5, 5):
        took.observe(seconds)
    data = metrics_data(registry.collect(), Resource.create({"service.name": "s"}), 1, time.time_ns())
    await asyncio.to_thread(OTLPMetricExporter(f"{collector.url}/v1/metrics").export, data)
    found = {item.name: item for item in collector.metrics.resource_metrics[0].scope_metrics[0].metrics}
    made = found["made"].sum
    assert made.is_monotonic
    assert made.data_points[0].as_double == 3
    assert made.data_points[0].attributes[0].value.string_value == "source"
    assert found["waiting"].gauge.data_points[0].as_double == 7
    point = found["took_seconds"].histogram.data_points[0]
    assert found["took_seconds"].unit == "s"
    assert (point.count, list(point.bucket_counts), list(point.explicit_bounds)) == (4, [1, 2, 1], [0.1, 1])
    assert point.sum == pytest.approx(6.05)


async def test_a_span_goes_on_with_the_callers_trace_and_passes_it_further(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{collector.url}/v1/traces")))
    monkeypatch.setattr(telemetry._Tracing, "tracer", provider.get_tracer("test"))
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    passed: dict[str, str] = {}

    def answer() -> None:
        with telemetry.server_span("GET", {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}):
            telemetry.inject_trace(passed)

    await asyncio.to_thread(answer)
    span = collector.traces.resource_spans[0].scope_spans[0].spans[0]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace_id, "b7ad6b7169203331")
    assert passed["traceparent"] == f"00-{trace_id}-{span.span_id.hex()}-01"


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-00000000000000000000000000000000-b7ad6b7169203331-01"])
def test_a_trace_begins_where_the_caller_has_none(traceparent: str) -> None:
    with telemetry.server_span("GET", {"traceparent": traceparent}):
        begun = trace.get_current_span().get_span_context()
        assert begun.is_valid
        assert telemetry.current_traceparent() == f"00-{begun.trace_id:032x}-{begun.span_id:016x}-00"
    assert telemetry.current_traceparent() is None
