"""What SDKs send through their defaults, with the openai client against the whole of Triad."""

import gzip
import json

import httpx
import openai
import pytest

from benchmarks.processes import Triad
from tests.e2e.clients import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ASKED = "Sort these numbers from small to large: 41, 7, 23, 5, 98."


async def test_shapes_of_requests_with_the_openai_client(server: Triad) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    history = [
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": ASKED},
    ]
    hints = {"reasoning_effort": "low", "verbosity": "low", "store": True, "service_tier": "flex"}
    whole = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=history, temperature=0, max_completion_tokens=1_000_000, stop="\n", **hints
    )
    answer = whole.parse()
    assert answer.service_tier == "default"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert "," not in (answer._request_id or "")

    one_each = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": ASKED}],
        temperature=0,
        max_tokens=12,
        stream=True,
        extra_body={"stream_interval": 1, "return_token_ids": True, "ignore_eos": True},
    )
    chunks = [chunk async for chunk in one_each]
    ids = [chunk.choices[0].token_ids for chunk in chunks if hasattr(chunk.choices[0], "token_ids")]
    assert [len(part) for part in ids] == [1] * 12

    choice = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Is 7 more than 5?"}],
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert choice.choices[0].message.content in ("yes", "no")

    text = await client.completions.create(model=MODEL, prompt="Hello")
    assert text.usage is not None
    assert text.usage.completion_tokens <= 16
    scored = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "Hello"
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    begin, *others = logprobs.tokens or ()
    assert (begin, "".join(others)) == ("<|bos|>", "Hello")
    assert logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in logprobs.token_logprobs[1:])

    with pytest.raises(openai.BadRequestError, match="maximum context length is") as caught:
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x " * 20_000}]
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_the_door_answers_as_http_has_it(client: httpx.AsyncClient) -> None:
    entry = (await client.get("/v1/models/")).json()["data"][0]
    assert entry["max_model_len"] == entry["max_context"] > 0
    answer = await client.post(
        "/v1/completions/",
        content=gzip.compress(json.dumps({"model": MODEL, "prompt": "Hi"}).encode()),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    assert answer.status_code == 200, answer.text
    assert len(answer.headers.get_list("x-request-id")) == 1
    metrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert metrics.text.endswith("# EOF\n")
    assert (await client.head("/metrics")).status_code == 200
