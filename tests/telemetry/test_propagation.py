"""A caller's trace goes on below it, in whatever format OTEL_PROPAGATORS says it comes."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry import propagate
from opentelemetry.propagators.b3 import B3MultiFormat, B3SingleFormat

from replicas.trace import SpanWriter
from router.api import create_app
from telemetry.propagation import carrier_of, parent_context
from telemetry.setup import Tracing
from tests.router.conftest import in_process
from tests.router.stack import a_stack
from tests.telemetry.collector import Collector, http_collector
from tests.telemetry.test_trace import CHAT, PARENT, one

_, TRACE_ID, SPAN_ID, _ = PARENT.split("-")
STATE = "vendor=a1,other=b2"
B3_MULTI = {"x-b3-traceid": TRACE_ID, "x-b3-spanid": SPAN_ID, "x-b3-sampled": "1"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with http_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
        yield collector


@pytest.fixture
def propagator() -> Iterator[None]:
    """What the environment says is read once a process; here it is put back."""
    before = propagate.get_global_textmap()
    yield
    propagate.set_global_textmap(before)


async def carriers(headers: list[tuple[str, str]]) -> list[dict[str, str]]:
    """What the replica of a request with these headers is given."""
    ingress, replica = Tracing("ingress", "i"), Tracing("replica", "r")
    assert replica.tracer is not None
    writer = SpanWriter(replica.tracer, "replica-0")
    async with (
        a_stack(service={"on_timeline": writer}, tracer=ingress.tracer) as stack,
        in_process(create_app(stack.door)) as client,
    ):
        given = []
        submit = stack.replicas[0].service.submit

        async def noting(request):
            given.append(dict(request.trace_carrier))
            return await submit(request)

        stack.replicas[0].service.submit = noting
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
        await stack.settled()
    ingress.close()
    replica.close()
    return given


def assert_connected(collector: Collector, trace_id: str = TRACE_ID, parent_id: str = SPAN_ID) -> str:
    """From the caller's span to the replica's; returns the ingress's span id."""
    spans = collector.trace(trace_id)
    server, root = one(spans, "POST /v1/chat/completions"), one(spans, "triad.replica")
    assert (server.parent_id, root.parent_id) == (parent_id, server.span_id)
    return server.span_id


async def test_tracestate_and_baggage_go_on_to_the_replica(collector: Collector) -> None:
    headers = [("traceparent", PARENT), ("tracestate", "vendor=a1"), ("tracestate", "other=b2")]
    (given,) = await carriers([*headers, ("baggage", "user=7")])
    span_id = assert_connected(collector)
    assert given == {
        "traceparent": f"00-{TRACE_ID}-{span_id}-01",
        "tracestate": STATE,
        "baggage": "user=7",
    }
    assert {span.trace_state for span in collector.trace(TRACE_ID)} == {STATE}


@pytest.mark.parametrize(
    ("format_", "headers"),
    [
        (B3MultiFormat, B3_MULTI),
        (B3SingleFormat, {"b3": f"{TRACE_ID}-{SPAN_ID}-1"}),
        (B3SingleFormat, B3_MULTI),
        (B3MultiFormat, {"x-b3-traceid": TRACE_ID, "x-b3-spanid": SPAN_ID, "x-b3-flags": "1"}),
    ],
)
async def test_b3_in_its_forms(collector: Collector, propagator: None, format_, headers) -> None:
    propagate.set_global_textmap(format_())
    (given,) = await carriers(list(headers.items()))
    assert_connected(collector)
    assert "traceparent" not in given
    assert any(name.lower().startswith(("b3", "x-b3")) for name in given)


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "00-zz")],
        [("traceparent", PARENT), ("traceparent", PARENT)],
        [("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01")],
        [("traceparent", "\xff" * 60)],
        [("baggage", "a" * 9000), ("tracestate", "=,=;;")],
        [("b3", "1-2-3-4-5")],
    ],
)
async def test_a_malformed_context_begins_a_trace_of_its_own(collector: Collector, headers) -> None:
    await carriers([(name, value.encode("latin-1")) for name, value in headers])  # type: ignore[misc]
    assert collector.trace(TRACE_ID) == []
    (server,) = [span for span in collector.spans if span.name == "POST /v1/chat/completions"]
    assert server.parent_id == ""
    assert_connected(collector, server.trace_id, "")


PROBE = """
import ray.serve
from telemetry.propagation import carrier_of, parent_context
from opentelemetry.trace import get_current_span
given = [(b"x-b3-traceid", b"%s"), (b"x-b3-spanid", b"%s"), (b"x-b3-sampled", b"1")]
print(format(get_current_span(parent_context(carrier_of(given))).get_span_context().trace_id, "032x"))
"""


def test_the_environment_names_the_format_and_all_of_triad_starts_with_it() -> None:
    environment = os.environ | {"OTEL_PROPAGATORS": "tracecontext,b3multi"}
    found = subprocess.run(
        [sys.executable, "-c", PROBE % (TRACE_ID, SPAN_ID)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.split()[-1] == TRACE_ID


def test_a_header_that_comes_twice_is_a_list() -> None:
    assert carrier_of([(b"TraceState", b"a=1"), (b"tracestate", b"b=2")]) == {"tracestate": "a=1,b=2"}
    assert not parent_context({})
