"""Header and prompt bounds, and CORS."""

import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router.api import create_app
from router.config import IngressConfig
from telemetry.logs import ACCESS
from tests.router.conftest import in_process, running
from tests.router.fakes import ScriptedReplica
from tests.router.test_api import CHAT, error_of
from tests.router.test_auth import RING

PATH = "/v1/chat/completions"


async def test_headers_have_bounds(make_door):
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        assert (
            error_of(await client.get("/healthz", headers={"x": "y" * 40_000}), 431)["code"]
            == "headers_too_large"
        )
        error_of(await client.get("/healthz", headers={f"x-{k}": "y" for k in range(101)}), 431)
        assert (await client.get("/healthz", headers={"x": "y" * 20_000})).status_code == 200


async def test_a_long_prompt_is_refused_before_a_replica_sees_it(make_door):
    replica = ScriptedReplica("a")
    door = await make_door(replica, config=IngressConfig(max_prompt_chars=1000))
    long = [{"role": "user", "content": "x" * 400}] * 3
    async with in_process(create_app(door)) as client:
        error = error_of(await client.post(PATH, json=CHAT | {"messages": long}), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        for prompt in ("x" * 1001, [1] * 1001, ["x" * 501, "y" * 500]):
            response = await client.post("/v1/completions", json={"model": CHAT["model"], "prompt": prompt})
            assert error_of(response, 400)["param"] == "prompt"
    assert replica.submitted == []


async def test_other_sites_pages_may_not_call_unless_they_are_listed(make_door):
    site, other = "https://chat.example.com", "https://evil.example.com"
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ask["Access-Control-Request-Headers"] += (
        ",content-type,traceparent,x-stainless-lang,x-stainless-retry-count"
    )
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with in_process(create_app(door)) as client:
        response = await client.options(PATH, headers={"Origin": site} | ask)
        assert response.status_code == 405
        assert "access-control-allow-origin" not in response.headers
    listed = await make_door(replica, config=IngressConfig(cors_origins=(site,)))
    async with running(replica.run()), in_process(create_app(listed)) as client:
        response = await client.options(PATH, headers={"Origin": site} | ask)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, site)
        answer = await client.post(PATH, json=CHAT, headers={"Origin": site})
        assert answer.headers["access-control-allow-origin"] == site
        refused = await client.options(PATH, headers={"Origin": other} | ask)
        assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize(
    "path", ["/x%0aINFO forged", "/x%0d%0ay", "/x%1b[2Jy", "/x%e2%80%a8y", "/v1/models/x%0ay"]
)
async def test_no_path_ends_a_line_of_the_log_or_names_a_span_so(make_door, caplog, path):
    caplog.set_level(logging.INFO, ACCESS)
    spans, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    door = await make_door(ScriptedReplica("a"), keys=RING, tracer=provider.get_tracer("test"))
    async with in_process(create_app(door)) as client:
        error_of(await client.get(path), 401)
    (line,) = [record.getMessage() for record in caplog.records if record.name == ACCESS]
    (name,) = [span.name for span in spans.get_finished_spans()]
    assert line.startswith(f"{name} 401 ")
    assert line.isprintable()
    assert "?" in name
