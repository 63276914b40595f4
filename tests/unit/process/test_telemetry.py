"""The caller's trace context, read as OpenTelemetry's propagator reads it."""

import pytest
from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from libs.process.telemetry import server_span

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    "traceparent",
    [
        f"00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-00",
        f"01-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01-what-the-future-has",
        f"00-{TRACE}-{SPAN}-01-extra",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        "",
        "junk",
    ],
)
def test_a_callers_span_is_the_one_that_the_propagator_reads(traceparent: str) -> None:
    headers = {"traceparent": traceparent}
    expected = trace.get_current_span(
        TraceContextTextMapPropagator().extract(headers, context.Context())
    ).get_span_context()
    with server_span("GET", headers):
        current = trace.get_current_span().get_span_context()
    assert current.is_valid
    assert current.is_remote == expected.is_valid
    if expected.is_valid:
        assert (current.trace_id, current.span_id) == (expected.trace_id, expected.span_id)
        assert current.trace_flags == expected.trace_flags
