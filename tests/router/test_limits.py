"""What a key may use, counted in a real server for all ingresses together."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import redis.asyncio

from cluster.embedded_redis import EmbeddedRedis
from policies.control.store import LoadStore
from replicas.errors import ErrorCode
from replicas.messages import GenerateRequest, SamplingParams
from router.api import create_app
from router.auth import ApiKey, KeyRing, digest_of, new_key
from router.errors import ApiError
from router.limits import KeyLimiter, estimated_prompt_tokens
from tests.eventually import eventually
from tests.router.conftest import in_process, running
from tests.router.fakes import WORDS, ScriptedReplica
from tests.router.test_api import CHAT, error_of
from tests.stores import patient_store

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    embedded = EmbeddedRedis.start()
    yield embedded
    embedded.stop()


@pytest.fixture
async def limiters(server: EmbeddedRedis) -> AsyncIterator[list[KeyLimiter]]:
    """Two, as two ingresses have."""
    app = f"test-{uuid.uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        made = [KeyLimiter(patient_store(server.url, app)) for _ in range(2)]
        for limiter in made:
            stack.push_async_callback(limiter.close)
        yield made


def a_key(**limits: int) -> ApiKey:
    return ApiKey("team", digest_of(new_key()), **limits)


def a_request(num_prompt: int = 10, max_tokens: int | None = 90) -> GenerateRequest:
    return GenerateRequest("r", "", (tuple(range(num_prompt)),), SamplingParams(max_tokens=max_tokens))


async def outcome(limiter: KeyLimiter, key: ApiKey, request: GenerateRequest) -> ApiError | None:
    try:
        await limiter.charge(key, request)
    except ApiError as error:
        return error
    return None


async def test_a_crowd_at_two_ingresses_gets_the_limit_between_them(limiters):
    key = a_key(requests_per_minute=20)
    asked = [outcome(limiters[k % 2], key, a_request()) for k in range(60)]
    outcomes = await asyncio.gather(*asked)
    refused = [error for error in outcomes if error is not None]
    assert len(refused) == 40
    assert {error.status for error in refused} == {429}
    assert {error.code for error in refused} == {"rate_limit_exceeded"}
    assert all(1 <= error.retry_after_s <= 3 for error in refused)


async def test_places_come_back_at_the_rate(limiters):
    key = a_key(requests_per_minute=600)
    began_s = time.monotonic()
    outcomes = await asyncio.gather(*[outcome(limiters[0], key, a_request()) for _ in range(700)])
    num_let_in = sum(error is None for error in outcomes)

    async def let_in() -> bool:
        return await outcome(limiters[1], key, a_request()) is None

    for _ in range(5):
        await eventually(let_in, every_s=0.02)
    elapsed_s = time.monotonic() - began_s
    assert num_let_in >= 600
    assert num_let_in + 5 <= 600 + 10 * elapsed_s + 1


async def test_tokens_are_charged_before_and_settled_after(limiters):
    key = a_key(tokens_per_minute=1000)
    charges = [await limiters[k % 2].charge(key, a_request()) for k in range(10)]
    error = await outcome(limiters[0], key, a_request())
    assert error is not None
    assert "tokens a minute" in error.message
    for charge in charges[:5]:
        limiters[0].settle(charge, 20)  # of 100

    async def let_in() -> bool:
        return await outcome(limiters[1], key, a_request(300, 90)) is None

    await eventually(let_in)


async def test_a_request_over_the_whole_bucket_goes_when_it_is_full(limiters):
    key = a_key(tokens_per_minute=1000)
    assert await outcome(limiters[0], key, a_request(10, 5000)) is None
    error = await outcome(limiters[0], key, a_request(1, 1))
    assert error is not None
    assert 230 <= error.retry_after_s <= 245


async def test_one_refused_is_charged_nothing(limiters):
    key = a_key(requests_per_minute=2, tokens_per_minute=1000)
    assert await outcome(limiters[0], key, a_request(10, 990)) is None
    for _ in range(5):
        assert "tokens" in (await outcome(limiters[0], key, a_request())).message
    fresh = a_key(requests_per_minute=2)
    assert await outcome(limiters[0], fresh, a_request()) is None


async def set_clock_back(server: EmbeddedRedis, app: str, seconds: int) -> None:
    """As the keys are after that: what they say was written so long from now."""
    client = redis.asyncio.Redis.from_url(server.url, decode_responses=True)
    keys = [key async for key in client.scan_iter(f"triad:{{{app}}}:limit:*")]
    assert keys
    for key in keys:
        at, written = map(int, (await client.get(key)).split(":"))
        ahead = seconds * 1_000_000
        await client.set(key, f"{at + ahead}:{written + ahead}", px=(seconds + 60) * 1000)
    await client.aclose()


async def test_a_clock_that_is_set_back_locks_nobody_out(server):
    app = f"test-{uuid.uuid4().hex[:8]}"
    limiter = KeyLimiter(patient_store(server.url, app))
    key = a_key(requests_per_minute=20, tokens_per_minute=2000)
    for _ in range(20):
        assert await outcome(limiter, key, a_request()) is None
    await set_clock_back(server, app, 3600)
    error = await outcome(limiter, key, a_request())
    assert error is not None, "what was used up still is"
    assert error.retry_after_s <= 4
    await limiter.close()


async def test_a_charge_is_settled_on_a_clock_that_was_set_back_meanwhile(server):
    app = f"test-{uuid.uuid4().hex[:8]}"
    limiter = KeyLimiter(patient_store(server.url, app))
    key = a_key(tokens_per_minute=1000)
    charge = await limiter.charge(key, a_request(10, 990))
    await set_clock_back(server, app, 3600)
    limiter.settle(charge, 0)
    await limiter.close()
    after = KeyLimiter(patient_store(server.url, app))
    assert await outcome(after, key, a_request(10, 980)) is None, "all of it has come back"
    await after.close()


async def test_a_key_that_holds_something_else_is_a_full_bucket(server):
    app = f"test-{uuid.uuid4().hex[:8]}"
    client = redis.asyncio.Redis.from_url(server.url)
    limiter = KeyLimiter(patient_store(server.url, app), "closed")
    name = f"triad:{{{app}}}:limit:team:requests"
    for write in (client.set, client.lpush, client.sadd):
        await client.delete(name)
        await write(name, "1783")
        assert await outcome(limiter, a_key(requests_per_minute=20), a_request()) is None
    await limiter.close()
    await client.aclose()


@pytest.mark.parametrize("when_lost", ["open", "closed"])
async def test_without_redis_it_is_open_or_closed_and_waits_once(when_lost):
    limiter = KeyLimiter(LoadStore(NOWHERE), when_lost)
    key = a_key(requests_per_minute=1)
    began_s = time.monotonic()
    for _ in range(50):
        error = await outcome(limiter, key, a_request())
        assert (error is None) == (when_lost == "open")
        if error is not None:
            assert (error.status, error.code, error.retry_after_s) == (503, "limits_unavailable", 1)
    assert time.monotonic() - began_s < 5.0
    assert await limiter.charge(a_key(), a_request()) is None  # nothing to count, nothing to wait for
    await limiter.close()


async def test_over_http_a_429_says_when_and_only_what_was_made_is_charged(make_door, limiters):
    secret = new_key()
    ring = KeyRing((ApiKey("team", digest_of(secret), tokens_per_minute=400),))
    replica = ScriptedReplica("a")
    door = await make_door(replica, keys=ring, limiter=limiters[0])
    headers = {"Authorization": f"Bearer {secret}"}
    async with running(replica.run()), in_process(create_app(door)) as client:
        bodies = [CHAT | {"max_tokens": 350}] * 5

        async def ask() -> bool:
            response = await client.post("/v1/chat/completions", json=bodies[0], headers=headers)
            return response.status_code == 200

        for _ in bodies:  # each is charged 350 at first, and 12 in the end
            await eventually(ask)
        assert 5 + len(WORDS) == 12
        response = await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 900}, headers=headers)
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1


async def test_over_http_a_prompt_that_was_accepted_is_charged_however_it_ends(make_door, limiters):
    """One of 5 tokens by the replica's count; what it refuses is charged nothing."""
    secret = new_key()
    ring = KeyRing((ApiKey("team", digest_of(secret), tokens_per_minute=100_000),))
    replica = ScriptedReplica("a")
    settled: list[int] = []
    limiters[0].settle = lambda charge, num_tokens: settled.append(num_tokens)  # type: ignore[method-assign]
    door = await make_door(replica, keys=ring, limiter=limiters[0])
    headers = {"Authorization": f"Bearer {secret}"}
    async with in_process(create_app(door)) as client:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(client.post("/v1/chat/completions", json=CHAT, headers=headers))
            await eventually(lambda: replica.live)
            replica.fail(*replica.live, ErrorCode.DEADLINE_EXCEEDED, "too late")
        assert waiting.result().status_code == 504
        assert settled == [5], "its prompt was computed, or was to be"
        waiting = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=headers))
        await eventually(lambda: replica.live)
        replica.step(*replica.live)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await eventually(lambda: len(settled) == 2)
        assert settled[1] in (5, 6), "with the word that it had begun, where that had come"
        replica.refusal = (ErrorCode.INVALID_REQUEST, "no")
        response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert error_of(response, 400)
        assert settled[2] == 0


def test_the_estimate_is_exact_for_ids_and_near_for_text():
    assert estimated_prompt_tokens(a_request(17)) == 17
    chat = GenerateRequest("r", "", (({"role": "user", "content": "x" * 400},),), SamplingParams())
    assert estimated_prompt_tokens(chat) == 104
