"""The console's routes over HTTP: its files, the stream of the cluster, bursts."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.control.plan import DecisionRecord, ObservedPlan, ReplicaPlan
from policies.control.store import ClusterView
from policies.modes import DecodePlan, Mode
from policies.replica_load import ClusterLoad, ObservedLoad, ReplicaLoad
from router import cluster_feed
from router.api import create_app
from router.cluster_feed import ClusterFeed, TokenRates
from router.latencies import RecentLatencies, quantile, summary
from router.metrics import Metrics
from tests.eventually import eventually
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import in_process, over_http, running
from tests.router.fakes import MODEL, FakeStore, ScriptedReplica, a_load
from tests.router.stack import a_stack
from tests.router.test_api import CHAT, error_of
from tests.router.test_auth import ADMIN, KEY, RING, bearer
from training.tasks.registry import FAMILIES, held_out_tasks

EVENTS, BURST = "/v1/triad/events", "/v1/triad/burst"
CONSOLE = Path(cluster_feed.__file__).with_name("console")
DIFFUSION = DecodePlan(Mode.DIFFUSION, 16)


def a_shift(load: ReplicaLoad, plan: DecodePlan, at_s: float) -> DecisionRecord:
    made = ReplicaPlan(2, plan, "threshold", "nine in flight", 0.1)
    return DecisionRecord(made, load, True, "leader", at_s)


def a_view(*loads: ReplicaLoad) -> ClusterView:
    plans = {
        load.replica_id: ObservedPlan(ReplicaPlan(1, DIFFUSION, "threshold", "two in flight"), 0.1, 5.0)
        for load in loads
    }
    return ClusterView(ClusterLoad(tuple(ObservedLoad(load, 0.1) for load in loads)), plans, "leader")


@asynccontextmanager
async def watching(url: str, **more: Any) -> AsyncIterator[AsyncIterator[tuple[str, dict[str, Any]]]]:
    async def events(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        name = ""
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])

    async with (
        httpx.AsyncClient(base_url=url, timeout=20) as client,
        client.stream("GET", EVENTS, **more) as r,
    ):
        assert r.status_code == 200, await r.aread()
        assert r.headers["content-type"].startswith("text/event-stream")
        yield events(r)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_feed, "PERIOD_S", 0.02)


async def test_the_page_is_whole_and_asks_for_no_key(make_door):
    door = await make_door(ScriptedReplica("a"), keys=RING)
    async with in_process(create_app(door)) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for path in CONSOLE.iterdir():
            found = await client.get(f"/console/{path.name}")
            assert (found.status_code, found.content) == (200, path.read_bytes())
            assert "://" not in path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert (await client.get("/console/..%2Fapi.py")).status_code == 404
        assert (await client.get("/console/api.py")).status_code == 404
        assert (await client.post("/", content="")).status_code == 401
        assert (await client.head("/")).status_code == 200


def test_the_examples_are_held_out_tasks_of_all_families():
    """To renew them: write this list as JSON to router/console/examples.json."""
    wanted = [{"family": name, "prompt": t.prompt} for name in FAMILIES for t in held_out_tasks(name, 2)]
    assert json.loads((CONSOLE / "examples.json").read_text()) == wanted


async def test_keys_where_there_are_any_are_an_admin_s(make_door):
    door = await make_door(ScriptedReplica("a"), keys=RING)
    async with in_process(create_app(door)) as client:
        for method, path in (("GET", EVENTS), ("HEAD", EVENTS), ("POST", BURST)):
            assert (await client.request(method, path)).status_code == 401
            assert (await client.request(method, path, headers=bearer(KEY))).status_code == 403
        assert error_of(await client.get(EVENTS, headers=bearer(KEY)), 403)["code"] == "admin_key_required"
        head = await client.head(EVENTS, headers=bearer(ADMIN))  # of a stream without an end
        assert (head.status_code, head.content) == (200, b"")


async def test_snapshots_have_plan_rates_and_latencies_and_shifts_come_once(make_door, quick):
    load = a_load("r1", num_running=2, num_waiting=1, decode=DIFFUSION, running_by_mode={Mode.AR: 2})
    store = FakeStore(a_view(load), (a_shift(load, DecodePlan(Mode.AR), 100.0),))
    metrics, replica = Metrics(MODEL, "i"), ScriptedReplica("a")
    door = await make_door(replica, store=store, metrics=metrics)
    async with running(replica.run()), over_http(create_app(door)) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        async with watching(url) as events:
            name, shift = await anext(events)
            assert (name, shift["plan"]["mode"], shift["before"]["mode"]) == ("shift", "ar", "diffusion")
            assert shift["plan"]["expected_tokens_per_s"] > 0
            assert (shift["reason"], shift["load"]["running"]) == ("nine in flight", 2)
            name, seen = await anext(events)
            assert (name, seen["store"]["available"], seen["leader"]) == ("snapshot", True, "leader")
            (one,) = seen["replicas"]
            assert (one["running"], one["waiting"], one["running_by_mode"]) == (2, 1, {"ar": 2})
            assert (one["plan"]["mode"], one["plan"]["reason"]) == ("diffusion", "two in flight")
            assert seen["latency"]["num_requests"] == 1
            assert seen["latency"]["ttft_p95_s"] > 0
            later = a_shift(load, DIFFUSION, 200.0)
            store.decisions = (replace(later, changed=False, at_s=201.0), later, *store.decisions)
            told = [await anext(events) for _ in range(6)]
            assert [event["at_s"] for name, event in told if name == "shift"] == [200.0]
            store.error = "gone"
            await eventually(lambda: door.view.loads())
            while seen["store"]["available"]:
                _, seen = await anext(events)
            assert [each["replica"] for each in seen["replicas"]] == ["r1"]
    metrics.close()


async def test_one_reading_for_all_who_watch_and_none_when_nobody_does(make_door, quick):
    store = FakeStore(a_view(a_load("r1")))
    door = await make_door(ScriptedReplica("a"), store=store)
    feed = ClusterFeed(door.dispatcher, door.view, store, RecentLatencies())
    assert feed.num_readings == 0
    watchers = [feed.watch() for _ in range(5)]
    for watcher in watchers:
        assert b"event: snapshot" in await anext(watcher)
    assert (feed.num_watchers, feed.num_readings) == (5, 1)
    for watcher in watchers:
        await watcher.aclose()
    assert feed.num_watchers == 0
    num = feed.num_readings
    await asyncio.sleep(5 * cluster_feed.PERIOD_S)
    assert feed.num_readings == num
    again = feed.watch()
    assert b"event: snapshot" in await anext(again)
    await again.aclose()


async def test_a_watcher_that_goes_makes_room_and_one_too_many_is_told(make_door, quick, monkeypatch):
    monkeypatch.setattr(cluster_feed, "MAX_WATCHERS", 1)
    door = await make_door(ScriptedReplica("a"), store=FakeStore(a_view(a_load("r1"))))
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        async with watching(url) as events:
            await anext(events)
            assert error_of(await client.get(EVENTS), 429)["message"].startswith("1 are watching")

        async def is_free() -> bool:
            async with client.stream("GET", EVENTS) as response:
                return response.status_code == 200

        await eventually(is_free)


async def test_streams_end_when_the_server_drains(make_door, quick):
    door = await make_door(ScriptedReplica("a"), store=FakeStore(a_view(a_load("r1"))))
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        async with watching(url) as events:
            await anext(events)
            door.dispatcher.drain()
            async for _ in events:
                pass
        assert error_of(await client.get(EVENTS), 503)["code"] == "unavailable"


def test_rates_are_what_was_made_between_two_loads():
    rates, load = TokenRates(), a_load("r1", tokens_total_by_mode={Mode.AR: 100})
    assert rates.of(ObservedLoad(load, 0.0), 10.0) == {}
    later = a_load("r1", tokens_total_by_mode={Mode.AR: 150, Mode.DIFFUSION: 30})
    assert rates.of(ObservedLoad(later, 0.0), 12.0) == {Mode.AR: 25.0, Mode.DIFFUSION: 15.0}
    # The same load read again says what it said.
    assert rates.of(ObservedLoad(later, 0.0), 12.01) == {Mode.AR: 25.0, Mode.DIFFUSION: 15.0}
    rates.keep(set())
    assert rates.of(ObservedLoad(later, 0.0), 13.0) == {}


def test_latencies_are_of_the_last_minute():
    now_s = 0.0
    latencies = RecentLatencies(lambda: now_s)
    latencies.note("a", 9.0, 9.0)
    now_s = 61.0
    for k in range(1, 21):
        latencies.note("a", k / 10, None if k == 1 else k / 100)
    assert summary(latencies.recent()) == {
        "num_requests": 20,
        "ttft_p50_s": 1.0,
        "ttft_p95_s": 1.9,
        "tpot_p50_s": 0.11,
        "tpot_p95_s": 0.2,
    }
    assert quantile([], 0.5) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [({"num_requests": 65}, "num_requests"), ({"duration_s": 0}, "duration_s"), ({"rate": 1}, "rate")],
)
async def test_a_burst_has_bounds(make_door, body, param):
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        assert error_of(await client.post(BURST, json=body), 400)["param"] == param


async def test_a_burst_runs_so_many_at_once_and_ends_and_there_is_one_at_a_time():
    runner = ScriptedRunner(num_pages=512, page_size=16, max_context=1024)
    metrics = Metrics(MODEL, "i")
    async with (
        a_stack([runner], metrics=metrics) as stack,
        over_http(create_app(stack.door)) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        response = await client.post(BURST, json={"num_requests": 3, "duration_s": 1})
        assert (response.status_code, response.json()) == (202, {"num_requests": 3, "duration_s": 1})
        await eventually(lambda: sum(stack.dispatcher.in_flight().values()) == 3)
        assert error_of(await client.post(BURST, json={}), 409)["code"] == "burst_running"
        await stack.settled()

        async def is_over() -> bool:
            return (await client.post(BURST, json={"num_requests": 1, "duration_s": 1})).status_code == 202

        await eventually(is_over, every_s=0.05)
        assert summary(metrics.latencies.recent())["num_requests"] >= 3
    assert sum(stack.dispatcher.in_flight().values()) == 0
    metrics.close()
