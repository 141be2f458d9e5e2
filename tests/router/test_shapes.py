"""The shapes of requests that clients send through their defaults."""

import pytest

from replicas.messages import TemplateOptions
from router.api import create_app
from router.config import IngressConfig
from router.schema import ChatCompletionRequest, CompletionRequest
from tests.router.conftest import in_process, running
from tests.router.fakes import MODEL, TEXT, ScriptedReplica
from tests.router.stack import a_stack
from tests.router.test_schema import CHAT, error_of, post
from tests.router.test_schema import TEXT as TEXT_BODY
from tests.router.test_sse import events

HINTS = {
    "store": True,
    "service_tier": "flex",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"a": 1},
    "moderation": None,
    "unheard_of": None,
}
CHAT_HINTS = HINTS | {
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("field", CHAT_HINTS)
async def test_a_hint_is_taken(field):
    assert (await post("/chat", CHAT | {field: CHAT_HINTS[field]})).status_code == 200
    if field in HINTS:
        assert (await post("/text", TEXT_BODY | {field: HINTS[field]})).status_code == 200


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "content": "x", "name": "Ann"}, {"role": "user", "content": "x", "name": "Ann"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "refusal": "no"}, {"role": "assistant", "content": "no"}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": "no"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "y"},
            {"role": "assistant", "content": "x", "reasoning_content": "y"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning": "y"},
            {"role": "assistant", "content": "x", "reasoning_content": "y"},
        ),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            },
            {"role": "user", "content": "a"},
        ),
        ({"role": "user", "content": "x", "provider_fields": None}, {"role": "user", "content": "x"}),
    ],
)
def test_a_message_reaches_the_template(message, told):
    body = CHAT | {"messages": [message]}
    assert ChatCompletionRequest.model_validate(body).prompts_for_replica() == ((told,),)


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({}, TemplateOptions()),
        ({"add_generation_prompt": False}, TemplateOptions(add_generation_prompt=False)),
        (
            {"continue_final_message": True},
            TemplateOptions(add_generation_prompt=False, continue_final_message=True),
        ),
        ({"chat_template_kwargs": {"a": [1]}}, TemplateOptions(kwargs='{"a": [1]}')),
        ({"reasoning_effort": "low"}, TemplateOptions(kwargs='{"reasoning_effort": "low"}')),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            TemplateOptions(kwargs='{"reasoning_effort": "none", "enable_thinking": true}'),
        ),
        ({"thinking": {"type": "disabled"}}, TemplateOptions(kwargs='{"enable_thinking": false}')),
        (
            {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": False}},
            TemplateOptions(kwargs='{"enable_thinking": false}'),
        ),
    ],
)
def test_what_is_said_of_the_template_reaches_it(body, options):
    assert ChatCompletionRequest.model_validate(CHAT | body).template == options


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"a": "x" * 20_000}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "\ud800"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": ["2"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [5] * 129}, "stop_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"thinking_token_budget": True}, "thinking_token_budget"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 5}, "thinking_token_budget": 5},
            "thinking_token_budget",
        ),
        ({"stream_interval": 1}, "stream_interval"),
        ({"stream_interval": 0, "stream": True}, "stream_interval"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
        ({"reasoning_effort": ""}, "reasoning_effort"),
        ({"messages": [{"role": "user", "name": "n"}]}, "messages[0].content"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "thinking.display"),
        (
            {"stream_options": {"include_obfuscation": True}, "stream": True},
            "stream_options.include_obfuscation",
        ),
    ],
)
async def test_what_can_not_be_meant_is_named(body, param):
    assert error_of(await post("/chat", CHAT | body))["param"] == param


def test_sampling_of_vllms_fields():
    body = {
        "stop_token_ids": [5.0, 7, 5],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "max_tokens": 4.0,
        "top_k": -1,
    }
    sampling = CompletionRequest.model_validate(TEXT_BODY | body).sampling(lambda: 0)
    assert (sampling.stop_token_ids, sampling.includes_stop, sampling.shows_special_tokens) == (
        (5, 7),
        True,
        True,
    )
    assert (sampling.max_tokens, sampling.top_k) == (4, 0)


@pytest.mark.parametrize(
    ("body", "num"), [({}, 16), ({"max_tokens": 3}, 3), ({"min_tokens": 20}, 20), ({"max_tokens": None}, 16)]
)
def test_a_text_completion_has_16_tokens_unless_it_says(body, num):
    assert CompletionRequest.model_validate(TEXT_BODY | body).sampling(lambda: 0).max_tokens == num
    chat = CHAT | {name: value for name, value in body.items() if name != "min_tokens"}
    assert ChatCompletionRequest.model_validate(chat).sampling(lambda: 0).max_tokens == body.get("max_tokens")


async def test_names_slashes_and_heads(make_door):
    replica = ScriptedReplica("r1")
    door = await make_door(replica, config=IngressConfig(served_model_name=(MODEL, "gpt-4o")))
    async with in_process(create_app(door)) as client:
        listed = (await client.get("/v1/models/")).json()["data"]
        assert [entry["id"] for entry in listed] == [MODEL, "gpt-4o"]
        assert {entry["max_model_len"] for entry in listed} == {1024}
        assert (await client.get("/v1/models/gpt-4o")).json()["id"] == "gpt-4o"
        assert (await client.head("/v1/models/")).status_code == 200
        assert (await client.head("/health")).status_code == 200
        body = {
            "model": "gpt-4o",
            "messages": [{"role": "user", "content": "Hi"}],
            "service_tier": "priority",
        }
        async with running(replica.run()):
            answer = (await client.post("/v1/chat/completions/", json=body)).json()
        assert (answer["model"], answer["service_tier"]) == (MODEL, "default")
        assert answer["choices"][0]["message"]["content"] == TEXT
        for nameless in ({k: v for k, v in body.items() if k != "model"}, body | {"model": None}):
            async with running(replica.run()):
                answer = await client.post("/v1/chat/completions", json=nameless)
            assert (answer.status_code, answer.json()["model"]) == (200, MODEL)
        missing = (await client.post("/v1/chat/completions", json=body | {"model": "x"})).json()["error"]
        assert f"'{MODEL}', 'gpt-4o'" in missing["message"]


def chat(**more):
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0} | more


async def streamed(client, path, body):
    response = await client.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    return events(response.content)[:-1]


@pytest.mark.parametrize("mode", ["ar", "diffusion", "self_speculation"])
@pytest.mark.parametrize("interval", [1, 3])
async def test_a_stream_interval_sets_the_tokens_of_each_chunk(mode, interval):
    body = chat(max_tokens=20, ignore_eos=True, decoding={"mode": mode}, return_token_ids=True)
    async with a_stack() as stack, in_process(create_app(stack.door)) as client:
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        chunks = await streamed(client, "/v1/chat/completions", body | {"stream_interval": interval, "n": 2})
    told = {index: [] for index in (0, 1)}
    text = ""
    for chunk in chunks:
        (choice,) = chunk["choices"]
        if "token_ids" in choice:
            told[choice["index"]].append(choice["token_ids"])
            text += choice["delta"]["content"] if choice["index"] == 0 else ""
    assert [token for part in told[0] for token in part] == whole["choices"][0]["token_ids"]
    assert text == whole["choices"][0]["message"]["content"]
    for parts in told.values():
        lens = list(map(len, parts))
        assert (sum(lens), lens[0]) == (20, 1)
        assert set(lens[1:-1]) == {interval}
        assert lens[-1] <= interval


async def test_token_ids_come_back(client_of_a_stack):
    body = {"model": MODEL, "prompt": [[5, 6], [7, 8, 9]], "n": 2, "max_tokens": 6, "return_token_ids": True}
    answer = (await client_of_a_stack.post("/v1/completions", json=body)).json()
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[5, 6]] * 2 + [[7, 8, 9]] * 2
    assert (
        sum(len(choice["token_ids"]) for choice in answer["choices"]) == answer["usage"]["completion_tokens"]
    )
    chunks = await streamed(client_of_a_stack, "/v1/completions", body | {"seed": 1})
    prompts = [c["choices"][0]["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c["choices"][0]]
    assert prompts == [[5, 6]] * 2 + [[7, 8, 9]] * 2

    answer = (await client_of_a_stack.post("/v1/chat/completions", json=chat(return_token_ids=True))).json()
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    chunks = await streamed(client_of_a_stack, "/v1/chat/completions", chat(return_token_ids=True))
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])


@pytest.fixture
async def client_of_a_stack():
    async with a_stack() as stack, in_process(create_app(stack.door)) as client:
        yield client


async def test_stop_tokens_end_the_text(client_of_a_stack):
    body = chat(max_tokens=30, ignore_eos=True, return_token_ids=True)
    free = (await client_of_a_stack.post("/v1/chat/completions", json=body)).json()["choices"][0]
    stop = free["token_ids"][9]
    before = free["token_ids"][: free["token_ids"].index(stop)]
    for mode in ("ar", "self_speculation"):
        more = {"stop_token_ids": [stop], "decoding": {"mode": mode}}
        answer = (await client_of_a_stack.post("/v1/chat/completions", json=body | more)).json()["choices"][0]
        assert answer["token_ids"] == [*before, stop]
        assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
        with_stop = body | more | {"include_stop_str_in_output": True}
        longer = (await client_of_a_stack.post("/v1/chat/completions", json=with_stop)).json()["choices"][0]
        assert longer["token_ids"] == [*before, stop]
        text = answer["message"]["content"]
        assert len(longer["message"]["content"]) > len(text)
        assert longer["message"]["content"].startswith(text)


async def test_the_prompt_is_cut_to_its_last_tokens(client_of_a_stack):
    body = {"model": MODEL, "prompt": list(range(5, 105)), "max_tokens": 4, "return_token_ids": True}
    answer = await client_of_a_stack.post("/v1/completions", json=body | {"truncate_prompt_tokens": 7})
    assert answer.json()["choices"][0]["prompt_token_ids"] == list(range(98, 105))
    entry = (await client_of_a_stack.get("/v1/models")).json()["data"][0]
    long = body | {"prompt": [5] * 3000, "truncate_prompt_tokens": -1, "ignore_eos": True}
    answer = (await client_of_a_stack.post("/v1/completions", json=long)).json()
    assert answer["usage"]["prompt_tokens"] == entry["max_model_len"] - 4
    assert answer["usage"]["completion_tokens"] == 4


async def test_max_tokens_is_cut_to_what_the_context_leaves(client_of_a_stack):
    most = (await client_of_a_stack.get("/v1/models")).json()["data"][0]["max_model_len"]
    for field in ("max_tokens", "max_completion_tokens"):
        body = chat(ignore_eos=True, **{field: 1_000_000})
        answer = (await client_of_a_stack.post("/v1/chat/completions", json=body)).json()
        assert answer["usage"]["total_tokens"] == most
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("length", [1, 400, 100_000])
async def test_a_prompt_that_is_too_long_is_told_in_openais_words(client_of_a_stack, length):
    most = (await client_of_a_stack.get("/v1/models")).json()["data"][0]["max_model_len"]
    num = most - 1 + length
    for path, body in (
        ("/v1/completions", {"prompt": [5] * num}),
        ("/v1/completions", {"prompt": "x" * num}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * num}], "max_tokens": 5}),
    ):
        error = error_of(await client_of_a_stack.post(path, json={"model": MODEL} | body))
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith(f"This model's maximum context length is {most} tokens. However, ")
        assert error["param"] == ("prompt" if "prompt" in body else "messages")


async def test_a_cache_salt_keeps_prefixes_apart(client_of_a_stack):
    body = {"model": MODEL, "prompt": list(range(5, 65)), "max_tokens": 2}

    async def cached(**more):
        answer = (await client_of_a_stack.post("/v1/completions", json=body | more)).json()
        assert "usage" in answer, answer
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert await cached() == 0
    assert await cached() > 0
    assert await cached(cache_salt="a") == 0
    assert await cached(cache_salt="a") > 0
    assert await cached(cache_salt="b") == 0


async def test_a_template_takes_no_name_of_the_renderers(client_of_a_stack):
    for name in ("chat_template", "messages", "eos_token", "tokenize"):
        body = chat(chat_template_kwargs={name: "x"})
        error = error_of(await client_of_a_stack.post("/v1/chat/completions", json=body))
        assert error["param"] == f"chat_template_kwargs.{name}"
