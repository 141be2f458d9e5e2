"""What is counted: every token once, whatever becomes of its request, under labels nobody can invent."""

import asyncio
import random
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics_families
from prometheus_client.parser import text_string_to_metric_families

from policies.control.store import ClusterView
from policies.modes import Mode
from policies.replica_load import ClusterLoad, ObservedLoad
from replicas.errors import ErrorCode
from replicas.messages import DecodingReport, Delta, Finished, FinishReason
from router.api import create_app
from router.app_state import AppState
from router.metrics import Metrics
from tests.eventually import eventually
from tests.router.conftest import in_process, over_http, running
from tests.router.fakes import MODEL, WORDS, FakeStore, ScriptedReplica, a_load
from tests.router.faults import Gated, chat
from tests.router.stack import a_stack
from tests.router.test_api import CHAT, streaming
from tests.router.test_auth import KEY, RING, bearer

PATH = "/v1/chat/completions"


def series(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """By name and labels."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def counted(metrics: Metrics, name: str, label: str) -> dict[str, float]:
    return {dict(labels)[label]: value for (n, labels), value in series(metrics).items() if n == name}


def tokens(metrics: Metrics) -> dict[str, float]:
    return counted(metrics, "triad_tokens_total", "mode")


def used(metrics: Metrics) -> dict[str, float]:
    return counted(metrics, "triad_key_tokens_total", "kind")


@pytest.fixture
def metrics():
    metrics = Metrics(MODEL, "i")
    yield metrics
    metrics.close()


async def first_piece(response: httpx.Response) -> AsyncIterator[bytes]:
    """To be kept: the response is closed with it."""
    pieces = response.aiter_raw()
    await anext(pieces)
    return pieces


async def begun(
    client: httpx.AsyncClient, replica: ScriptedReplica, num: int, **more
) -> tuple[httpx.Response, AsyncIterator[bytes]]:
    """A stream of which so many tokens have come."""
    client.headers.update(bearer(KEY))
    opening = streaming(client, CHAT | {"stream": True} | more)
    await eventually(lambda: replica.live)
    (request_id,) = replica.live
    for _ in range(num):
        replica.step(request_id)
    response = await opening
    return response, await first_piece(response)


async def test_the_tokens_of_a_stream_whose_client_goes_are_counted_once(make_door, metrics):
    replica = ScriptedReplica("a")
    door = await make_door(replica, keys=RING, metrics=metrics)
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        response, _pieces = await begun(client, replica, 3, n=2)
        await response.aclose()
        await eventually(lambda: tokens(metrics))
        assert tokens(metrics) == {"ar": 6}
        assert used(metrics) == {"prompt": 5, "completion": 6}
        assert counted(metrics, "triad_key_tokens_total", "key") == {"team": 6}
        # The next one is counted beside it, and the one that went not again.
        async with running(replica.run()):
            assert (await client.post(PATH, json=CHAT)).status_code == 200
        assert tokens(metrics) == {"ar": 6 + 3, "diffusion": 4}
        assert used(metrics) == {"prompt": 10, "completion": 6 + len(WORDS)}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_tokens_of_a_request_that_fails_are_counted(make_door, metrics, stream):
    replica = ScriptedReplica("a")
    door = await make_door(replica, keys=RING, metrics=metrics)
    async with in_process(create_app(door)) as client:
        asking = asyncio.create_task(client.post(PATH, json=CHAT | {"stream": stream}, headers=bearer(KEY)))
        await eventually(lambda: replica.live)
        (request_id,) = replica.live
        for _ in range(4):
            replica.step(request_id)
        replica.fail(request_id, ErrorCode.DEADLINE_EXCEEDED, "too late")
        await asking
    assert tokens(metrics) == {"ar": 4}
    assert used(metrics) == {"prompt": 5, "completion": 4}


async def test_what_a_lost_replica_had_sent_is_counted_without_a_mode(make_door, metrics):
    replica = ScriptedReplica("a")
    door = await make_door(replica, keys=RING, metrics=metrics)
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        response, _pieces = await begun(client, replica, 2)
        replica.break_channels()
        await eventually(lambda: tokens(metrics))
        await response.aclose()
    assert tokens(metrics) == {"unknown": 2}
    assert used(metrics) == {"prompt": 5, "completion": 2}


async def test_what_was_made_before_a_second_try_is_counted_as_made_but_not_as_used(make_door, metrics):
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    door = await make_door(*replicas, keys=RING, metrics=metrics)
    async with in_process(create_app(door)) as client:
        asking = asyncio.create_task(client.post(PATH, json=CHAT, headers=bearer(KEY)))
        await eventually(lambda: replicas[0].live or replicas[1].live)
        first, second = sorted(replicas, key=lambda replica: not replica.live)
        (request_id,) = first.live
        first.step(request_id)
        first.step(request_id)
        # Both have come; only then is the replica lost.
        await eventually(lambda: first._channels and all(q.empty() for q in first._channels.values()))
        first.break_channels()
        async with running(second.run()):
            assert (await asking).status_code == 200
    assert tokens(metrics) == {"unknown": 2, "ar": 3, "diffusion": 4}
    assert used(metrics) == {"prompt": 5, "completion": len(WORDS)}


async def test_a_refused_request_uses_nothing(make_door, metrics):
    replica = ScriptedReplica("a")
    replica.refusal = (ErrorCode.INVALID_REQUEST, "no")
    door = await make_door(replica, keys=RING, metrics=metrics)
    async with in_process(create_app(door)) as client:
        assert (await client.post(PATH, json=CHAT, headers=bearer(KEY))).status_code == 400
    assert tokens(metrics) == used(metrics) == {}


async def test_a_request_that_ends_while_its_client_goes_is_counted_by_its_last_word(make_door, metrics):
    replica = ScriptedReplica("a")
    door = await make_door(replica, keys=RING, metrics=metrics)
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        response, _pieces = await begun(client, replica, 1)
        (request_id,) = replica.live
        live = replica.live[request_id]

        async def all_at_once(ids: tuple[str, ...]) -> None:
            replica._publish(live, Delta(request_id, "x", 1, (), 0, FinishReason.STOP))
            report = DecodingReport({Mode.DIFFUSION: 2}, 1)
            replica._end(request_id, Finished(request_id, 5, 2, report))

        replica.cancel = all_at_once  # the cancel comes too late
        await response.aclose()
        await eventually(lambda: tokens(metrics))
    assert tokens(metrics) == {"diffusion": 2}
    assert used(metrics) == {"prompt": 5, "completion": 2}


async def test_no_counter_goes_back_when_a_replica_starts_anew(metrics):
    def totals(replica_id: str, num: int) -> None:
        load = a_load(replica_id, tokens_total_by_mode={Mode.AR: num, Mode.DIFFUSION: 2 * num})
        metrics.seen.view = ClusterView(ClusterLoad((ObservedLoad(load, 0.1),)))

    before: dict = {}
    for replica_id, num in [("a", 5), ("a", 9), ("b", 1), ("b", 4)]:
        totals(replica_id, num)
        now = {at: value for at, value in series(metrics).items() if at[0] == "triad_replica_tokens_total"}
        assert len(now) == 2
        assert all(value >= before.get(at, 0.0) for at, value in now.items())
        before |= now
    assert sorted(before.values()) == [4, 8, 9, 18]


async def test_a_sibling_that_misses_a_scrape_leaves_it_and_comes_back_no_lower(make_door, metrics):
    other = Metrics(MODEL, "j")
    other.answered("/v1/models", 200)
    answers = [other.own_families(), [], None]

    async def siblings():
        found = answers.pop(0)
        return other.own_families() if found is None else found

    door = await make_door(ScriptedReplica("a"), metrics=metrics, siblings=siblings)
    seen = []
    async with in_process(create_app(door)) as client:
        for _ in range(3):
            text = (await client.get("/metrics")).text
            other.answered("/v1/models", 200)
            seen.append([line for line in text.splitlines() if 'ingress="j"' in line and "http" in line])
    assert [bool(lines) for lines in seen] == [True, False, True]
    assert float(seen[2][0].split()[-1]) > float(seen[0][0].split()[-1])
    other.close()


async def flood(door: AppState, replica: ScriptedReplica, rng: random.Random, num: int) -> None:
    async with running(replica.run()), in_process(create_app(door)) as client:

        def word() -> str:
            return "".join(rng.choices("abcdefghij0123456789", k=8))

        for _ in range(num):
            method = rng.choice(["GET", "PUT", "BREW", "HEAD"])
            await client.request(method, f"/{word()}/{word()}")
            await client.get(f"/v1/models/{word()}")
            await client.post(PATH, json=CHAT | {"model": word()})
            await client.post(PATH, json=CHAT | {word(): 1}, headers={"x-request-id": word()})
            decoding = {"mode": "diffusion", "threshold": rng.random(), "block_length": rng.randint(2, 64)}
            more = {"user": word(), "seed": rng.getrandbits(60), "decoding": decoding}
            await client.post(PATH, json=CHAT | more, headers={"authorization": f"Bearer {word()}"})


async def test_clients_can_not_make_series(make_door, metrics):
    replica = ScriptedReplica("a")
    door = await make_door(replica, metrics=metrics)
    await flood(door, replica, random.Random(1), 3)
    before = set(series(metrics))
    await flood(door, replica, random.Random(2), 100)
    assert set(series(metrics)) == before
    assert ("triad_http_requests_total", "404") in {
        (name, dict(labels).get("status")) for name, labels in before
    }


async def test_names_are_as_prometheus_wants_them(make_door, metrics):
    """A gauge does not end in _total; a counter does."""
    store = FakeStore(ClusterView(ClusterLoad((ObservedLoad(a_load("r", num_pages=7), 0.1),))))
    metrics.seen.view = await store.read_view()
    metrics.answered("/v1/models", 200)
    families = list(text_string_to_metric_families(metrics.exposition().decode()))
    assert "triad_pages_capacity" in {family.name for family in families}
    for family in families:
        assert family.name.endswith("_total") is False
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name


@pytest.mark.parametrize("mode", ["ar", "diffusion", "self_speculation"])
async def test_a_real_replica_says_by_which_mode_a_cancelled_stream_was_made(metrics, mode):
    runner = Gated()
    async with (
        a_stack([runner], metrics=metrics) as stack,
        over_http(create_app(stack.door)) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        body = chat(max_tokens=60, stream=True, decoding={"mode": mode})
        opening = streaming(client, body)
        runner.allow(4)
        response = await opening
        _pieces = await first_piece(response)
        await eventually(lambda: runner.num_begun == 5)  # it waits in a forward
        await response.aclose()
        await eventually(lambda: stack.replicas[0].service._thread.has_commands)  # the cancel
        runner.allow()
        await stack.settled()
        await eventually(lambda: tokens(metrics))
        (load,) = [replica.service.snapshot() for replica in stack.replicas]
    assert set(tokens(metrics)) == {mode}
    assert 0 < tokens(metrics)[mode] < 60
    assert used(metrics)["completion"] == tokens(metrics)[mode] == load.tokens_total_by_mode[mode]


async def test_cancelled_and_reused_tokens_are_counted(metrics):
    async with a_stack(metrics=metrics) as stack, in_process(create_app(stack.door)) as client:
        body = {"model": MODEL, "prompt": list(range(5, 65)), "max_tokens": 2}
        for _ in range(2):
            assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert counted(metrics, "triad_reused_tokens_total", "ingress")["i"] > 0
    assert not counted(metrics, "triad_cancelled_tokens_total", "error_type")


async def test_the_tokens_of_a_failed_request_are_counted_as_cancelled(make_door, metrics):
    replica = ScriptedReplica("a")
    door = await make_door(replica, metrics=metrics)
    async with in_process(create_app(door)) as client:
        asking = asyncio.create_task(client.post(PATH, json=CHAT))
        await eventually(lambda: replica.live)
        (request_id,) = replica.live
        for _ in range(3):
            replica.step(request_id)
        replica.fail(request_id, ErrorCode.DEADLINE_EXCEEDED, "too late")
        await asking
    assert counted(metrics, "triad_cancelled_tokens_total", "error_type") == {"deadline_exceeded": 3}


async def test_openmetrics_comes_where_it_is_asked_for(make_door, metrics):
    door = await make_door(ScriptedReplica("a"), metrics=metrics)
    metrics.answered("/x", 200)
    async with in_process(create_app(door)) as client:
        accept = {"Accept": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.5"}
        answer = await client.get("/metrics", headers=accept)
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        families = {family.name: family for family in open_metrics_families(answer.text)}
        assert families["triad_http_requests"].type == "counter"
        plain = await client.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert not plain.text.endswith("# EOF\n")


def test_names_are_as_promtool_would_have_them(metrics):
    """Its lint: counters alone end in _total, units are base units, no name has a type, each has help."""
    metrics.seen.view = ClusterView(ClusterLoad((ObservedLoad(a_load("a"), 0.1),)))
    metrics.answered("/x", 200)
    metrics.cancelled("cancelled", 1)
    metrics.reused(1)
    metrics.used(None, 1, 2)
    metrics.made(DecodingReport({Mode.AR: 2}, 1, 1), 2)
    families = list(text_string_to_metric_families(metrics.exposition().decode()))
    assert len(families) > 15
    for family in families:
        assert family.documentation
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        words = family.name.split("_")
        assert not set(words) & {"ms", "milliseconds", "minutes", "counter", "gauge", "histogram", "summary"}
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
        if family.type != "histogram":
            assert words[-1] not in ("count", "sum", "bucket")
