"""W3C trace context in and out of a header: https://www.w3.org/TR/trace-context/."""

from opentelemetry.context import Context
from opentelemetry.trace import Span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

HEADER = "traceparent"

_PROPAGATOR = TraceContextTextMapPropagator()


def parent_context(traceparent: str | None) -> Context:
    """Empty for none or a malformed one, which begins a trace of its own."""
    return Context() if not traceparent else _PROPAGATOR.extract({HEADER: traceparent}, context=Context())


def traceparent_of(span: Span) -> str | None:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context=set_span_in_context(span, Context()))
    return carrier.get(HEADER)
