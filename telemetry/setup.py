"""OpenTelemetry by its standard environment variables. Off unless they ask for it, and then free.

Traces go out when OTEL_TRACES_EXPORTER is `otlp` or an OTLP endpoint is set, metrics likewise by
OTEL_METRICS_EXPORTER; OTEL_SDK_DISABLED=true and the exporter `none` turn them off. Everything else
(headers, sampler, batches, resource) is the SDK's own to read. The providers are ours alone: Ray
Serve may set the global ones.
"""

import logging
import os

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

SCOPE = "triad"

_PROTOCOLS = ("http/protobuf", "grpc")


class TelemetryError(ValueError):
    """An environment variable asks for what there is not; the message names it and the choices."""


class Tracing:
    """One process's traces; tracer is None where tracing is off.

    service: the part of Triad, such as `ingress`
    """

    def __init__(self, service: str, instance: str):
        self._provider: TracerProvider | None = None
        if _wanted("TRACES"):
            self._provider = TracerProvider(resource=_resource(service, instance), shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(_span_exporter()))

    @property
    def tracer(self) -> Tracer | None:
        return None if self._provider is None else self._provider.get_tracer(SCOPE)

    def close(self) -> None:
        """Sends the spans that wait; blocks for as long as the exporter's timeout."""
        if self._provider is not None:
            self._provider.shutdown()


def meter_provider(service: str, instance: str, *readers: MetricReader) -> MeterProvider:
    """A provider with these readers, and with the OTLP one where the environment asks for it."""
    more: list[MetricReader] = []
    if _wanted("METRICS"):
        more.append(PeriodicExportingMetricReader(_metric_exporter()))
    resource = _resource(service, instance)
    return MeterProvider(metric_readers=[*readers, *more], resource=resource, shutdown_on_exit=False)


def _wanted(signal: str) -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    name = f"OTEL_{signal}_EXPORTER"
    exporter = os.environ.get(name, "").strip().lower()
    if exporter not in ("", "otlp", "none"):
        raise TelemetryError(f"{name}={exporter}: the exporters are otlp and none")
    if exporter:
        return exporter == "otlp"
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return any(os.environ.get(endpoint) for endpoint in endpoints)


def _protocol(signal: str) -> str:
    name = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    protocol = os.environ.get(name) or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or _PROTOCOLS[0]
    if protocol not in _PROTOCOLS:
        raise TelemetryError(f"{name}={protocol}: the protocols are {' and '.join(_PROTOCOLS)}")
    return protocol


def _span_exporter() -> SpanExporter:
    if _protocol("TRACES") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    return Http()


def _metric_exporter() -> MetricExporter:
    if _protocol("METRICS") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

        return Grpc()
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

    return Http()


def _resource(service: str, instance: str) -> Resource:
    attributes = {"service.instance.id": instance, "triad.component": service}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = f"triad-{service}"
    return Resource.create(attributes)
