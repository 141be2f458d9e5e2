"""Trace context in and out of headers, in the formats that OTEL_PROPAGATORS names.

By default W3C's: https://www.w3.org/TR/trace-context/ and https://www.w3.org/TR/baggage/.
"""

from collections.abc import Iterable, Mapping

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.trace import Span, set_span_in_context


def parent_context(carrier: Mapping[str, str]) -> Context:
    """The context that headers carry; empty for none or malformed ones, which begin a trace of their own."""
    return propagate.extract(carrier, context=Context())


def carrier_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """ASGI's headers as a propagator reads them: one that comes several times is one list, as in HTTP."""
    carrier: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        carrier[name] = f"{carrier[name]},{value}" if name in carrier else value
    return carrier


def carrier_below(span: Span, parent: Context) -> dict[str, str]:
    """Headers for what is called in a span, with all else that its parent's context has."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=set_span_in_context(span, parent))
    return carrier
