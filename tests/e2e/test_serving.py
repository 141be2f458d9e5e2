"""The whole of Triad over HTTP: real Serve, real Valkey, the embedded model."""

import asyncio
import json

import httpx
import openai
import pytest

from tests.e2e.clients import MODEL, PATH, all_fresh, chat, complete, state_of, stream, text_of, total
from tests.e2e.host import Host
from tests.eventually import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = "Sort these numbers from small to large: 41, 7, 23, 5, 98."
MODES = ["ar", "diffusion", "self_speculation"]


@pytest.mark.parametrize("mode", MODES)
async def test_each_mode_streams_and_says_how_it_decoded(client: httpx.AsyncClient, mode: str) -> None:
    body = chat(PROMPT, decoding={"mode": mode})
    streamed = await stream(client, body)
    assert streamed.done
    assert streamed.error is None
    assert streamed.last is not None
    assert streamed.usage is not None
    report = streamed.last["decoding"]
    assert report["tokens"] == {mode: 48}
    assert report["rule"] == "request"
    assert report["switches"] == 0
    assert report["tokens_per_forward"] == pytest.approx(47 / report["forwards"], abs=1e-3)
    assert streamed.usage["completion_tokens"] == 48
    assert streamed.last["choices"][0]["finish_reason"] == "length"
    assert streamed.num_chunks >= 3
    assert streamed.text == text_of(await complete(client, body))


async def test_auto_is_told_apart_from_a_pinned_mode(client: httpx.AsyncClient) -> None:
    streamed = await stream(client, chat(PROMPT))
    assert streamed.last is not None
    assert streamed.last["decoding"]["rule"] == "threshold"
    assert sum(streamed.last["decoding"]["tokens"].values()) == 48


async def test_a_bound_on_quality_is_kept_by_what_was_measured_of_the_checkpoint(
    client: httpx.AsyncClient,
) -> None:
    """The level for one request is diffusion 16 by the learned sampler: 0.6 % of its answers differ."""

    async def is_by_diffusion(max_differing: float) -> bool:
        decoding = {"quality": {"max_differing": max_differing}}
        answer = await complete(client, chat(PROMPT, decoding=decoding))
        return set(answer["decoding"]["tokens"]) == {"diffusion"}

    await eventually(lambda: is_by_diffusion(0.01), within_s=30)
    assert not await is_by_diffusion(0.0001)


async def test_self_speculation_is_ar_token_for_token(client: httpx.AsyncClient) -> None:
    penalties = {"presence_penalty": 0.7, "repetition_penalty": 1.2, "logit_bias": {"50": 2.0}}
    for more in ({}, {"temperature": 0.8, "seed": 5}, penalties):
        ar, speculated = [
            text_of(await complete(client, chat(PROMPT, decoding={"mode": mode}, **more)))
            for mode in ("ar", "self_speculation")
        ]
        assert ar == speculated


async def test_the_openai_client_works_unchanged(server: Host) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": PROMPT}]
    whole = await client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=20, seed=1, stop=["\n\n\n"], user="u"
    )
    assert whole.choices[0].message.role == "assistant"
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            temperature=0,
            max_tokens=20,
            seed=1,
            stop=["\n\n\n"],
            stream=True,
            extra_body={"decoding": {"mode": "ar"}},
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    completion = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=5, temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 5
    (model,) = [model async for model in client.models.list()]
    assert model.id == MODEL
    with pytest.raises(openai.BadRequestError, match="functions"):
        await client.chat.completions.create(model=MODEL, messages=messages, functions=[{"name": "f"}])
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="gpt", messages=messages)


async def test_a_forced_call_is_the_same_in_every_lossless_mode_streamed_or_not(server: Host) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    unit = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": unit}}
    found = []
    for mode in ("ar", "self_speculation", "auto"):
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": PROMPT}],
            "tools": [tool],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": 0,
            "extra_body": {"decoding": {"mode": mode, "lossless": mode == "auto"}},
        }
        whole = await client.chat.completions.create(**body)
        (call,) = whole.choices[0].message.tool_calls
        assert whole.choices[0].finish_reason == "tool_calls"
        pieces = [
            piece.function
            async for chunk in await client.chat.completions.create(**body, stream=True)
            for piece in chunk.choices[0].delta.tool_calls or []
        ]
        assert "".join(piece.name or "" for piece in pieces) == call.function.name == "weather"
        assert "".join(piece.arguments for piece in pieces) == call.function.arguments
        found.append(call.function.arguments)
    assert json.loads(found[0])["unit"] in ("C", "F")
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (chat(PROMPT, audio={"voice": "x"}), "audio", "unsupported_parameter"),
        (chat(PROMPT, tempersture=1), "tempersture", "unknown_parameter"),
        (chat(PROMPT, temperature=9), "temperature", "invalid_value"),
        (chat(PROMPT, decoding={"mode": "ar", "block_length": 8}), "decoding.block_length", "invalid_value"),
        (chat("word " * 2000), None, "context_length_exceeded"),
    ],
    ids=[
        "unsupported",
        "unknown",
        "out of range",
        "contradiction",
        "prompt too long",
    ],
)
async def test_what_cannot_be_served_is_a_400(
    client: httpx.AsyncClient, body: dict, param: str | None, code: str
) -> None:
    for streamed in (False, True):
        response = await client.post(PATH, json=body | {"stream": streamed})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == code
        assert param is None or error["param"] == param


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


async def test_choices_logprobs_and_structured_output(server: Host) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    schema = {"name": "person", "schema": PERSON, "strict": True}
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 200,
        "n": 3,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    whole = await client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        assert set(json.loads(choice.message.content)) == {"name", "age"}
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for mode in ("ar", "self_speculation"):
        again = ["", "", ""]
        stream = await client.chat.completions.create(
            **asked, stream=True, extra_body={"decoding": {"mode": mode}}
        )
        async for chunk in stream:
            again[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert again == texts
    for change, param in (
        ({"schema": {"type": "bogus"}}, "response_format.json_schema.schema"),
        ({"name": ""}, "response_format.json_schema.name"),
    ):
        form = {"type": "json_schema", "json_schema": schema | change}
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(**(asked | {"response_format": form}))
        assert bad.value.param == param


async def test_diffusion_in_a_form_streams_json_that_the_schema_allows(client: httpx.AsyncClient) -> None:
    schema = {"name": "person", "schema": PERSON, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    body = chat(PROMPT, max_tokens=200, response_format=form, ignore_eos=False)
    body |= {"decoding": {"mode": "diffusion"}}
    whole = (await client.post(PATH, json=body)).json()
    assert set(json.loads(whole["choices"][0]["message"]["content"])) == {"name", "age"}
    assert whole["decoding"]["tokens_per_forward"] > 0
    streamed = await stream(client, body)
    assert streamed.text == whole["choices"][0]["message"]["content"]
    assert streamed.modes == {"diffusion"}


async def test_penalties_lead_auto_away_from_diffusion(client: httpx.AsyncClient) -> None:
    body = chat(PROMPT, presence_penalty=0.5)
    pinned = await stream(client, body | {"decoding": {"mode": "diffusion"}})
    assert pinned.modes == {"diffusion"}
    assert (await stream(client, body)).modes <= {"ar", "self_speculation"}


async def test_max_tokens_are_cut_to_what_the_context_leaves(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    for max_tokens in (model["max_context"] - 1, 100_000):
        response = await client.post(PATH, json=chat(PROMPT, max_tokens=max_tokens))
        assert response.status_code == 200
        assert response.json()["usage"]["total_tokens"] <= model["max_context"]


async def test_the_state_shows_both_replicas_and_a_leader(client: httpx.AsyncClient) -> None:
    state = await eventually(lambda: all_fresh(client), within_s=60, every_s=0.1)
    assert [r["load"]["max_running"] for r in state["replicas"]] == [64, 64]
    assert set(state["router"]["in_flight"]) == {r["replica"] for r in state["replicas"]}
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 200


async def is_idle(client: httpx.AsyncClient) -> bool:
    return await total(client, "num_running") == 0


async def test_a_disconnect_frees_the_pages(client: httpx.AsyncClient) -> None:
    await eventually(lambda: is_idle(client), within_s=30, every_s=0.1)
    pages_before = await total(client, "pages_used")
    body = chat(PROMPT, max_tokens=900, stream=True, decoding={"mode": "ar"})
    async with client.stream("POST", PATH, json=body) as response:
        lines = response.aiter_lines()
        for _ in range(4):
            await anext(lines)

        async def runs() -> bool:
            return await total(client, "num_running") == 1

        await eventually(runs, within_s=10, every_s=0.05)
        assert await total(client, "pages_used") > pages_before

    async def freed() -> bool:
        return await is_idle(client) and await total(client, "pages_used") == pages_before

    await eventually(freed, within_s=5, every_s=0.05)
    assert sum((await state_of(client))["router"]["in_flight"].values()) == 0


async def test_a_disconnect_while_the_whole_answer_is_made_frees_too(client: httpx.AsyncClient) -> None:
    asking = asyncio.create_task(complete(client, chat(PROMPT, max_tokens=900, decoding={"mode": "ar"})))

    async def runs() -> bool:
        return await total(client, "num_running") == 1

    await eventually(runs, within_s=20, every_s=0.05)
    asking.cancel()
    await eventually(lambda: is_idle(client), within_s=5, every_s=0.05)


async def test_an_answer_has_one_request_id(client: httpx.AsyncClient) -> None:
    for headers in ({}, {"x-request-id": "mine-7"}):
        for method, path in (
            ("GET", "/v1/models"),
            ("HEAD", "/healthz"),
            ("GET", "/nowhere"),
            ("POST", PATH),
        ):
            response = await client.request(method, path, headers=headers)
            (found,) = response.headers.get_list("x-request-id")
            assert found == headers.get("x-request-id", found)


async def test_the_worst_bodies_leave_a_stream_as_it_is(client: httpx.AsyncClient) -> None:
    body = chat("Write a short story about Anna.", max_tokens=400, decoding={"mode": "ar"})
    alone = await stream(client, body)
    beside = asyncio.create_task(stream(client, body))
    start = json.dumps(chat(PROMPT))[:-1].encode()
    for what in (b"{}", b"5", b'{"role":"user","content":6}'):
        messages = b",".join([what] * (7 * 2**20 // (len(what) + 1)))
        content = start + b', "messages": [' + messages + b"]}"
        response = await client.post(PATH, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert len(response.content) < 3000
    assert (await beside).text == alone.text
    long = await client.post(PATH, json=chat("x " * 40_000))
    assert (long.status_code, long.json()["error"]["param"]) == (400, "messages")
