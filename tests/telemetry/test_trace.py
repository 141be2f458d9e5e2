"""A real OTLP receiver sees one connected trace a request, from the client's to the engine's rounds."""

import asyncio
import itertools
import json
import logging
import threading

import pytest

from policies.modes import DecodePlan, Mode
from replicas.engine.batch import ScheduledBatch
from replicas.trace import SpanWriter
from router.api import create_app
from router.metrics import Metrics
from telemetry.logs import ACCESS, JsonFormatter
from telemetry.setup import TelemetryError, Tracing
from tests.eventually import eventually
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import in_process
from tests.router.fakes import MODEL
from tests.router.stack import a_stack
from tests.telemetry.collector import Collector, Span, grpc_collector, http_collector

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "a secret"}],
    "max_tokens": 40,
    "ignore_eos": True,
    "temperature": 0,
}


class PausedRunner(ScriptedRunner):
    """Stops before one forward until it is let go."""

    def __init__(self, pause_at: int) -> None:
        super().__init__()
        self._pause_at = pause_at
        self.reached, self.go = threading.Event(), threading.Event()

    def run(self, batch: ScheduledBatch):
        if self.num_forwards == self._pause_at:
            self.reached.set()
            assert self.go.wait(30)
        return super().run(batch)


@pytest.fixture(params=["http/protobuf", "grpc"])
def collector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    start = grpc_collector if request.param == "grpc" else http_collector
    with start() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", request.param)
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
        yield collector


def one(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


async def test_one_connected_trace_from_the_client_to_the_rounds(collector: Collector) -> None:
    ingress, replica = Tracing("ingress", "i"), Tracing("replica", "r")
    runner = PausedRunner(pause_at=8)
    assert replica.tracer is not None
    writer = SpanWriter(replica.tracer, "replica-0")
    async with (
        a_stack([runner], service={"on_timeline": writer}, tracer=ingress.tracer) as stack,
        in_process(create_app(stack.door)) as client,
    ):
        service = stack.replicas[0].service
        service.set_plan(DecodePlan(Mode.DIFFUSION, 4), "first")
        headers = {"traceparent": PARENT, "x-request-id": "mine"}
        body = CHAT | {"stream": True}
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=body, headers=headers))
        await eventually(runner.reached.is_set)
        service.set_plan(DecodePlan(Mode.AR), "second")
        runner.go.set()
        response = await asking
        text = response.content
        assert response.headers["x-request-id"] == "mine"
        assert b"[DONE]" in text
        await stack.settled()
        alone = await client.post("/v1/chat/completions", json=CHAT)
        bad = await client.post("/v1/chat/completions", json=CHAT | {"n": 0})
        assert (alone.status_code, bad.status_code) == (200, 400)
        await stack.settled()
    for tracing in (ingress, replica):
        tracing.close()

    _, trace_id, client_span, _ = PARENT.split("-")
    spans = collector.trace(trace_id)
    server = one(spans, "POST /v1/chat/completions")
    root = one(spans, "triad.replica")
    assert server.parent_id == client_span
    assert root.parent_id == server.span_id
    assert (server.component, root.component) == ("ingress", "replica")
    inside = [span for span in spans if span.parent_id == root.span_id]
    assert {span.name for span in inside} == {"triad.queue", "triad.prefill", "triad.decode"}
    assert len(spans) == 2 + len(inside)

    inside.sort(key=lambda span: span.start_ns)
    assert [span.name for span in inside][:2] == ["triad.queue", "triad.prefill"]
    for before, after in itertools.pairwise(inside):
        assert before.start_ns <= before.end_ns <= after.start_ns + 1000
    assert root.start_ns <= inside[0].start_ns
    assert inside[-1].end_ns <= root.end_ns

    decodes = [span for span in inside if span.name == "triad.decode"]
    assert [span.attributes["triad.mode"] for span in decodes] == ["diffusion", "ar"]
    assert sum(span.attributes["triad.tokens"] for span in decodes) == 40
    assert decodes[1].attributes["triad.forwards"] == decodes[1].attributes["triad.tokens"]
    report = json.loads(text.decode().split("data: ")[-2])["decoding"]
    assert sum(span.attributes["triad.forwards"] for span in decodes) == report["forwards"]
    ((event, shift),) = root.events
    assert event == "triad.mode_shift"
    assert shift == {"triad.mode.from": "diffusion", "triad.mode.to": "ar", "triad.rule": "second"}
    assert server.attributes["gen_ai.request.model"] == MODEL
    assert server.attributes["gen_ai.operation.name"] == "chat"
    assert server.attributes["gen_ai.usage.output_tokens"] == 40
    assert server.attributes["http.response.status_code"] == 200
    assert "secret" not in repr(collector.spans)

    others = {span.trace_id for span in collector.spans} - {trace_id}
    assert len(others) == 2
    sizes = sorted(len(collector.trace(other)) for other in others)
    assert sizes[0] == 1  # the refused one went no further than the ingress
    assert sizes[1] >= 5


async def test_every_choice_has_a_span_of_its_own(collector: Collector) -> None:
    tracing = Tracing("replica", "r")
    assert tracing.tracer is not None
    writer = SpanWriter(tracing.tracer, "replica-0")
    async with (
        a_stack(service={"on_timeline": writer}, tracer=tracing.tracer) as stack,
        in_process(create_app(stack.door)) as client,
    ):
        headers = {"traceparent": PARENT}
        response = await client.post("/v1/chat/completions", json=CHAT | {"n": 3}, headers=headers)
        assert response.status_code == 200
        await stack.settled()
    tracing.close()
    spans = collector.trace(PARENT.split("-")[1])
    server = one(spans, "POST /v1/chat/completions")
    roots = [span for span in spans if span.name == "triad.replica"]
    assert sorted(root.attributes["triad.choice.index"] for root in roots) == [0, 1, 2]
    made = sum(root.attributes["gen_ai.usage.output_tokens"] for root in roots)
    usage = response.json()["usage"]["completion_tokens"]
    assert made == server.attributes["gen_ai.usage.output_tokens"] == usage
    assert len(server.attributes["gen_ai.response.finish_reasons"]) == 3


async def test_a_failed_request_says_so_in_its_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
        tracing = Tracing("ingress", "i")
        runner = ScriptedRunner()
        runner.fail_next = RuntimeError("no memory")
        assert tracing.tracer is not None
        writer = SpanWriter(tracing.tracer, "replica-0")
        async with (
            a_stack([runner], service={"on_timeline": writer}, tracer=tracing.tracer) as stack,
            in_process(create_app(stack.door)) as client,
        ):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 500
            await stack.settled()
        tracing.close()
        assert {span.attributes.get("error.type") for span in collector.spans} >= {"internal_error"}
        assert {span.status for span in collector.spans if span.name != "triad.queue"} >= {2}


async def test_metrics_go_out_by_otlp_and_to_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    with http_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", collector.endpoint + "/v1/metrics")
        metrics = Metrics(MODEL, "i")
        async with a_stack(metrics=metrics) as stack, in_process(create_app(stack.door)) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            text = (await client.get("/metrics")).text
        metrics.close()
        assert "gen_ai_server_time_to_first_token_seconds_bucket" in text
        assert collector.metric_names >= {
            "gen_ai.server.request.duration",
            "gen_ai.server.time_to_first_token",
            "gen_ai.server.time_per_output_token",
            "triad.tokens",
        }


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
    ],
)
async def test_off_is_off(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Tracing("ingress", "i").tracer is None
    async with a_stack() as stack, in_process(create_app(stack.door)) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert stack.replicas[0].service._requests._on_timeline is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")],
)
def test_what_there_is_not_is_an_error_that_names_it(monkeypatch, name, value):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    with pytest.raises(TelemetryError, match=value):
        Tracing("ingress", "i")


async def test_a_json_line_has_the_requests_and_the_traces_id(monkeypatch, caplog) -> None:
    with http_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
        tracing = Tracing("ingress", "i")
        lines: list[dict] = []

        class Keep(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lines.append(json.loads(JsonFormatter().format(record)))

        handler = Keep()
        logger = logging.getLogger(ACCESS)
        logger.addHandler(handler)
        caplog.set_level(logging.INFO, ACCESS)
        async with a_stack(tracer=tracing.tracer) as stack, in_process(create_app(stack.door)) as client:
            headers = {"traceparent": PARENT, "x-request-id": "mine"}
            await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            await client.get("/healthz")
        logger.removeHandler(handler)
        tracing.close()
    (line,) = lines
    assert (line["request_id"], line["trace_id"]) == ("mine", PARENT.split("-")[1])
    assert (line["status"], line["gen_ai.usage.output_tokens"]) == (200, 40)
    assert "secret" not in json.dumps(line)
