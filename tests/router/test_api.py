import asyncio
import json
from dataclasses import replace

import httpx
import openai
import pytest

from policies.control.plan import DecisionRecord, ObservedPlan, ReplicaPlan
from policies.control.store import ClusterView
from policies.forecast import forecast
from policies.modes import DecodePlan, Mode
from policies.replica_load import ClusterLoad, ObservedLoad
from replicas.errors import ErrorCode
from router.api import create_app
from router.config import IngressConfig
from router.metrics import Metrics
from tests.eventually import eventually
from tests.router.conftest import in_process, over_http, running
from tests.router.fakes import MODEL, TEXT, WORDS, FakeStore, ScriptedReplica, a_load
from tests.router.test_sse import events

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_the_openai_client_works_unchanged(make_door):
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), over_http(create_app(door)) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        whole = await client.chat.completions.create(**CHAT, temperature=0, seed=1)
        assert whole.choices[0].message.content == TEXT
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.total_tokens == 5 + len(WORDS)
        assert whole.decoding["tokens_per_forward"] == 1.2

        stream = await client.chat.completions.create(
            **CHAT, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage.completion_tokens == len(WORDS)
        assert len({c.id for c in chunks}) == 1

        stream = await client.chat.completions.create(
            **CHAT, n=2, stream=True, extra_body={"stream_options": {"continuous_usage_stats": True}}
        )
        counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage.prompt_tokens == 5]
        assert counts[:2] == [0, 0]  # the roles
        assert counts == sorted(counts)
        assert len(set(counts)) > 3
        assert counts[-1] == 2 * len(WORDS)

        text = await client.completions.create(model=MODEL, prompt="Hi", max_tokens=5)
        assert text.choices[0].text == TEXT
        pieces = [c async for c in await client.completions.create(model=MODEL, prompt=[1, 2], stream=True)]
        assert "".join(c.choices[0].text for c in pieces) == TEXT

        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == [MODEL]
        assert (await client.models.retrieve(MODEL)).max_context == 1024

        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(**CHAT, n=0)
        assert bad.value.param == "n"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(**(CHAT | {"model": "gpt"}))
        assert missing.value.code == "model_not_found"


async def test_choices_and_logprobs_with_the_openai_client(make_door):
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), over_http(create_app(door)) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        whole = await client.chat.completions.create(**CHAT, n=3, logprobs=True, top_logprobs=2, seed=5)
        assert [(choice.index, choice.message.content) for choice in whole.choices] == [
            (index, TEXT) for index in range(3)
        ]
        for choice in whole.choices:
            assert "".join(entry.token for entry in choice.logprobs.content) == TEXT
            assert bytes(b for entry in choice.logprobs.content for b in entry.bytes) == TEXT.encode()
            assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {2}
        assert whole.usage.completion_tokens == 3 * len(WORDS)
        assert (whole.usage.prompt_tokens, replica.submitted[0].num_choices) == (5, 3)

        texts, ends, tokens = {}, [], {}
        async for chunk in await client.chat.completions.create(**CHAT, n=2, logprobs=True, stream=True):
            (choice,) = chunk.choices
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.logprobs is not None:
                tokens.setdefault(choice.index, []).extend(entry.token for entry in choice.logprobs.content)
            if choice.finish_reason is not None:
                ends.append((choice.index, choice.finish_reason, hasattr(chunk, "decoding")))
        assert texts == {0: TEXT, 1: TEXT}
        assert tokens == {0: list(WORDS), 1: list(WORDS)}
        assert ends == [(1, "stop", False), (0, "stop", True)]

        several = await client.completions.create(model=MODEL, prompt=["Hi", "Ho"], n=2, logprobs=1)
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
        assert replica.submitted[-1].prompts == ("Hi", "Ho")
        offsets = several.choices[3].logprobs.text_offset
        assert [TEXT[at:] for at in offsets] == ["".join(WORDS[k:]) for k in range(len(WORDS))]


async def test_what_is_asked_for_reaches_the_replica(make_door):
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), in_process(create_app(door)) as client:
        body = CHAT | {
            "temperature": 0.5,
            "decoding": {"mode": "self_speculation", "block_length": 8},
            "timeout_s": 9,
            "priority": -3,
        }
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        (request,) = replica.submitted
        assert request.prompts == (({"role": "user", "content": "Hi"},),)
        assert request.sampling.temperature == 0.5
        assert (request.decoding.mode, request.decoding.block_length) == (Mode.SELF_SPECULATION, 8)
        assert 0 < request.timeout_s <= 9
        assert request.priority == -3


async def test_seeds_not_given_are_drawn_anew(make_door):
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), in_process(create_app(door)) as client:
        for _ in range(2):
            await client.post("/v1/chat/completions", json=CHAT)
    first, second = replica.submitted
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize(
    ("code", "status", "type_"),
    [
        (ErrorCode.INVALID_REQUEST, 400, "invalid_request_error"),
        (ErrorCode.CONTEXT_LENGTH_EXCEEDED, 400, "invalid_request_error"),
        (ErrorCode.QUEUE_FULL, 429, "rate_limit_error"),
        (ErrorCode.UNAVAILABLE, 503, "service_unavailable_error"),
        (ErrorCode.DEADLINE_EXCEEDED, 504, "timeout_error"),
        (ErrorCode.INTERNAL, 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_status(make_door, code, status, type_, stream):
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with in_process(create_app(door)) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
        await eventually(lambda: replica.live)
        replica.fail(next(iter(replica.live)), code, "because")
        response = await asking
    error = error_of(response, status)
    assert (error["type"], error["code"]) == (type_, code.value)
    assert ("retry-after" in response.headers) == (status in (429, 503))


async def test_an_error_after_the_first_token_is_an_event(make_door):
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with in_process(create_app(door)) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": True}))
        await eventually(lambda: replica.live)
        (request_id,) = replica.live
        replica.step(request_id)
        replica.fail(request_id, ErrorCode.DEADLINE_EXCEEDED, "too late")
        response = await asking
    assert response.status_code == 200
    *parts, last = events(response.content)
    assert last["error"]["code"] == "deadline_exceeded"
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == WORDS[0]


def streaming(client: httpx.AsyncClient, body: dict) -> asyncio.Task[httpx.Response]:
    """Done once the status is there; the body is to be read."""
    request = client.build_request("POST", "/v1/chat/completions", json=body)
    return asyncio.create_task(client.send(request, stream=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_words", [0, 2], ids=["before the first token", "in mid-stream"])
async def test_a_disconnect_cancels_at_the_replica(make_door, stream, num_words):
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        opening = streaming(client, CHAT | {"stream": stream})
        await eventually(lambda: replica.live)
        (request_id,) = replica.live
        for _ in range(num_words):
            replica.step(request_id)
        if stream and num_words:
            response = await opening
            await anext(response.aiter_raw())
            await response.aclose()
        else:
            opening.cancel()
        await eventually(lambda: replica.cancelled == [request_id])
        await eventually(lambda: door.dispatcher.in_flight() == {"a": 0})


async def test_the_first_token_comes_before_the_status(make_door):
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        opening = streaming(client, CHAT | {"stream": True})
        await eventually(lambda: replica.live)
        # The server answers something else meanwhile, so it had its chance to send the status.
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert not opening.done()
        (request_id,) = replica.live
        replica.step(request_id)
        response = await opening
        assert response.headers["content-type"].startswith("text/event-stream")
        await response.aclose()


async def test_what_the_model_cannot_do_is_a_400(make_door):
    door = await make_door(ScriptedReplica("a", modes=[Mode.AR]))
    async with in_process(create_app(door)) as client:
        body = CHAT | {"decoding": {"mode": "diffusion"}}
        error = error_of(await client.post("/v1/chat/completions", json=body), 400)
    assert (error["param"], error["code"]) == ("decoding.mode", "invalid_request")


async def test_a_risk_without_a_sampler_is_a_400(make_door):
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        for decoding in ({"risk": 0.1}, {"mode": "diffusion", "risk": 0.1}):
            body = CHAT | {"decoding": decoding}
            error = error_of(await client.post("/v1/chat/completions", json=body), 400)
            assert (error["param"], error["code"]) == ("decoding.risk", "invalid_request")
            assert "no learned sampler" in error["message"]


async def test_token_ids_beyond_the_vocabulary_are_a_400(make_door):
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": [1, 500]})
    assert error_of(response, 400)["param"] == "prompt"


async def chunks_of(body: bytes, size: int):
    for at in range(0, len(body), size):
        yield body[at : at + size]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_too_large_is_a_413(make_door, declared):
    door = await make_door(ScriptedReplica("a"), config=IngressConfig(max_body_bytes=2000))
    body = json.dumps(CHAT | {"user": "x" * 3000}).encode()
    content = body if declared else chunks_of(body, 500)
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
    assert error_of(response, 413)["code"] == "request_entity_too_large"


async def test_unknown_paths_and_methods_answer_in_the_same_form(make_door):
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        error_of(await client.get("/v1/nothing"), 404)
        response = await client.get("/v1/chat/completions")
        error_of(response, 405)
        assert response.headers["allow"] == "POST"
        error_of(await client.get("/v1/models/gpt"), 404)
        error_of(
            await client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}),
            400,
        )


async def test_a_bug_is_a_500_in_the_same_form(make_door):
    door = await make_door(ScriptedReplica("a"))
    app = create_app(door)

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("secret detail")

    async with in_process(app) as client:
        error = error_of(await client.get("/bug"), 500)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]


async def test_ready_once_a_replica_is(make_door):
    async with in_process(create_app(await make_door())) as client:
        assert (await client.get("/healthz")).status_code == 200
        error_of(await client.get("/readyz"), 503)
        error_of(await client.post("/v1/chat/completions", json=CHAT), 503)
        assert (await client.get("/v1/models")).json()["data"][0]["modes"] is None
    async with in_process(create_app(await make_door(ScriptedReplica("a")))) as client:
        assert (await client.get("/readyz")).status_code == 200
        (entry,) = (await client.get("/v1/models")).json()["data"]
        assert entry["modes"] == ["ar", "diffusion", "self_speculation"]
        assert entry["max_context"] == 1024


async def test_the_state_shows_loads_plans_and_decisions(make_door):
    plan = ReplicaPlan(3, DecodePlan(Mode.DIFFUSION, 16), "threshold", "1 in flight <= 2", 0.1)
    load = a_load("a", num_running=1, running_by_mode={Mode.DIFFUSION: 1})
    view = ClusterView(
        ClusterLoad((ObservedLoad(load, 0.2), ObservedLoad(a_load("gone", max_running=0), float("inf")))),
        {"a": ObservedPlan(plan, 0.1, 7.0)},
        "leader-1",
    )
    store = FakeStore(view=view, decisions=(DecisionRecord(plan, load, True, "leader-1", 1.5),))
    door = await make_door(ScriptedReplica("a"), store=store)
    async with in_process(create_app(door)) as client:
        state = (await client.get("/v1/triad/state")).json()
        assert state["store"] == {"available": True, "error": None}
        assert state["leader"] == "leader-1"
        first, second = state["replicas"]
        assert (first["replica"], first["freshness"], first["age_s"]) == ("a", "fresh", 0.2)
        assert first["load"]["running_by_mode"] == {"diffusion": 1}
        assert first["plan"]["plan"]["decode"]["mode"] == "diffusion"
        assert first["plan"]["stale"] is False
        foretold = {tuple(entry["decode"].values())[:2]: entry for entry in first["forecasts"]}
        assert set(foretold) >= {("ar", 1), ("self_speculation", 16), ("diffusion", 32)}
        expected = forecast(load, DecodePlan(Mode.DIFFUSION, 32))
        assert foretold["diffusion", 32]["tokens_per_s"] == pytest.approx(expected.tokens_per_s)
        assert (second["freshness"], second["age_s"], second["plan"]) == ("lost", None, None)
        assert second["forecasts"] == []
        assert state["decisions"][0]["plan"]["reason"] == "1 in flight <= 2"
        assert state["router"].pop("num_tasks") >= 1
        assert state["router"] == {"in_flight": {"a": 0}, "ready": True}

        store.error = "no answer"
        state = (await client.get("/v1/triad/state")).json()
        assert state["store"] == {"available": False, "error": "no answer"}
        assert [replica["replica"] for replica in state["replicas"]] == ["a", "gone"]
        assert state["decisions"] is None


async def test_without_a_store_requests_are_served(make_door):
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    door = await make_door(*replicas, store=FakeStore(error="down"))
    async with running(replicas[0].run()), running(replicas[1].run()), in_process(create_app(door)) as client:
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=CHAT) for _ in range(8)))
    assert [a.json()["choices"][0]["message"]["content"] for a in answers] == [TEXT] * 8


@pytest.mark.parametrize(
    "path", ["/health", "/healthz", "/readyz", "/metrics", "/v1/models", f"/v1/models/{MODEL}"]
)
async def test_head_is_answered_as_get_is_without_the_body(make_door, path):
    metrics = Metrics(MODEL, "i")
    app = create_app(await make_door(ScriptedReplica("a"), metrics=metrics))
    async with over_http(app) as url, httpx.AsyncClient(base_url=url) as client:
        head, get = await client.head(path), await client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        assert get.content
        assert (await client.head("/v1/chat/completions")).status_code == 405
        assert (await client.head("/v1/nothing")).status_code == 404
    metrics.close()


@pytest.mark.parametrize(
    ("given", "told"),
    [("mine-7", "mine-7"), ("two words\\\xe9", "two_words__"), ("x" * 500, "x" * 128), (None, None)],
)
async def test_an_answer_has_one_request_id(make_door, given, told):
    headers = {} if given is None else {"x-request-id": given.encode("latin-1")}
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        (found,) = (await client.get("/v1/models", headers=headers)).headers.get_list("x-request-id")
        assert found == told if told else found.startswith("req-")
    # Serve's server gives every answer one.
    async with in_process(create_app(replace(door, answers_id=False))) as client:
        assert "x-request-id" not in (await client.get("/v1/models", headers=headers)).headers


async def test_a_client_that_shuts_its_side_counts_as_gone(make_door):
    """By TCP it looks like one that has closed, and a place held for nobody would cost the others."""
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with over_http(create_app(door)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        body = json.dumps(CHAT).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: t", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        writer.write(head.encode() + body)
        await eventually(lambda: replica.live)
        (request_id,) = replica.live
        writer.write_eof()
        assert await reader.read() == b""
        await eventually(lambda: replica.cancelled == [request_id])
        writer.close()
