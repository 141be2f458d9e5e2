"""The operators' routes: the policy at run time, and Prometheus's figures."""

import pickle
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.embedded_redis import EmbeddedRedis
from policies.control.policy_setting import PolicyChoice, PolicyWatch
from policies.control.store import ClusterView, LoadStore
from policies.modes import Mode
from policies.replica_load import ClusterLoad, ObservedLoad
from router.api import create_app
from router.ingress import answers_in_time
from router.metrics import Metrics
from tests.router.conftest import in_process, running
from tests.router.fakes import MODEL, FakeStore, ScriptedReplica, a_load
from tests.router.test_api import CHAT, error_of
from tests.router.test_auth import ADMIN, KEY, RING, bearer
from tests.stores import patient_store

PATH = "/v1/triad/policy"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    embedded = EmbeddedRedis.start()
    yield embedded
    embedded.stop()


@pytest.fixture
async def store(server: EmbeddedRedis) -> AsyncIterator[LoadStore]:
    store = patient_store(server.url, f"test-{uuid.uuid4().hex[:8]}")
    yield store
    await store.close()


async def test_an_admin_sets_the_policy_and_takes_it_back(make_door, store):
    changes = []
    watch = PolicyWatch(store, PolicyChoice("threshold"), changes.append)
    door = await make_door(ScriptedReplica("a"), keys=RING, policy=watch)
    async with in_process(create_app(door)) as client:
        body = {"policy": "self_speculation", "policy_params": {"block_length": 8}}
        assert (
            error_of(await client.put(PATH, json=body, headers=bearer(KEY)), 403)["code"]
            == "admin_key_required"
        )
        error_of(await client.put(PATH, json=body), 401)
        error_of(await client.delete(PATH, headers=bearer(KEY)), 403)
        assert changes == []

        response = await client.put(PATH, json=body, headers=bearer(ADMIN))
        assert response.status_code == 200, response.text
        state = response.json()
        assert state["in_force"] == body
        assert (state["configured"]["policy"], state["set_at_run_time"]) == ("threshold", True)
        assert [policy.name for policy in changes] == ["fixed"]
        assert (await client.get(PATH, headers=bearer(KEY))).json() == state

        state = (await client.delete(PATH, headers=bearer(ADMIN))).json()
        assert (state["in_force"]["policy"], state["set_at_run_time"]) == ("threshold", False)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"policy": "fastest"}, "policy", "threshold"),
        ({"policy": "os.path.join"}, "policy", "threshold"),
        ({"policy": "threshold", "policy_params": {"levles": []}}, "policy_params", "levles"),
        ({"policy": "ar", "policy_params": 5}, "policy_params", "dictionary"),
        ({"polciy": "ar"}, "policy", "policy"),
    ],
)
async def test_a_wrong_policy_is_a_400(make_door, store, body, param, words):
    watch = PolicyWatch(store, PolicyChoice("threshold"), lambda policy: pytest.fail("it was taken"))
    door = await make_door(ScriptedReplica("a"), keys=RING, policy=watch)
    async with in_process(create_app(door)) as client:
        error = error_of(await client.put(PATH, json=body, headers=bearer(ADMIN)), 400)
        assert error["param"] == param
        assert words in error["message"]


async def test_without_redis_the_policy_can_not_be_set(make_door):
    lost = LoadStore("redis://:hidden@127.0.0.1:1/0")
    watch = PolicyWatch(lost, PolicyChoice("threshold"), lambda policy: None)
    door = await make_door(ScriptedReplica("a"), keys=RING, policy=watch)
    async with in_process(create_app(door)) as client:
        response = await client.put(PATH, json={"policy": "ar"}, headers=bearer(ADMIN))
        assert error_of(response, 503)["code"] == "unavailable"
        assert "hidden" not in response.text
    await lost.close()


async def test_prometheus_sees_requests_and_what_replicas_publish(make_door):
    load = a_load("r1", num_waiting=3, tokens_per_forward={Mode.SELF_SPECULATION: 2.5})
    store = FakeStore(ClusterView(ClusterLoad((ObservedLoad(load, 0.2),))))
    metrics = Metrics(MODEL, "i")
    replica = ScriptedReplica("a")
    door = await make_door(replica, store=store, keys=RING, metrics=metrics)
    async with running(replica.run()), in_process(create_app(door)) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=bearer(KEY))).status_code == 200
        await client.get("/wp-admin/setup.php")
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        lines = response.text.splitlines()
        for line in (
            'triad_requests_waiting{replica="r1"} 3.0',
            'triad_acceptance_length{replica="r1"} 2.5',
            'triad_key_tokens_total{ingress="i",key="team",kind="completion"} 7.0',
            'triad_tokens_total{ingress="i",mode="diffusion"} 4.0',
            'triad_http_requests_total{ingress="i",route="/v1/chat/completions",status="200"} 1.0',
            'triad_http_requests_total{ingress="i",route="unknown",status="401"} 1.0',
            'triad_redis_up{ingress="i"} 1.0',
        ):
            assert line in lines, response.text
        store.error = "gone"
        lines = (await client.get("/metrics")).text.splitlines()
        assert 'triad_redis_up{ingress="i"} 0.0' in lines
        assert not [line for line in lines if line.startswith("triad_requests_waiting{")]
    metrics.close()


async def test_one_scrape_shows_every_ingress(make_door):
    load = a_load("r1", num_waiting=3)
    store = FakeStore(ClusterView(ClusterLoad((ObservedLoad(load, 0.2),))))
    metrics, other = Metrics(MODEL, "i"), Metrics(MODEL, "j")
    other.seen.view = await store.read_view()
    other.answered("/v1/models", 200)
    other.answered("/v1/models", 404)

    async def siblings():
        return pickle.loads(pickle.dumps(other.own_families()))

    door = await make_door(ScriptedReplica("a"), store=store, metrics=metrics, siblings=siblings)
    async with in_process(create_app(door)) as client:
        await client.get("/v1/models")
        lines = (await client.get("/metrics")).text.splitlines()
    for line in (
        'triad_http_requests_total{ingress="i",route="/v1/models",status="200"} 1.0',
        'triad_http_requests_total{ingress="j",route="/v1/models",status="200"} 1.0',
        'triad_http_requests_total{ingress="j",route="/v1/models",status="404"} 1.0',
        'triad_requests_waiting{replica="r1"} 3.0',
    ):
        assert lines.count(line) == 1
    assert len([line for line in lines if line.startswith("# TYPE triad_http_requests_total ")]) == 1
    metrics.close()
    other.close()


@pytest.mark.parametrize("error", [TimeoutError("too late"), DeploymentUnavailableError("gone")])
async def test_ingresses_that_do_not_answer_are_left_out_of_a_scrape(error):
    class Broadcast:
        async def results_async(self, *, timeout_s, return_exceptions):
            raise error

    assert await answers_in_time(Broadcast()) == []
