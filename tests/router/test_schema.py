import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from starlette.responses import Response

from policies.modes import Mode
from replicas.messages import DecodingOptions
from router.errors import add_error_handlers, json_response
from router.schema import ChatCompletionRequest, CompletionRequest
from tests.thorough import examples

BOUND = {"max_differing": 0.01}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "m", "prompt": "Hi"}


def echo_app() -> FastAPI:
    """Only the door's validation and error form."""
    app = FastAPI()
    add_error_handlers(app)

    @app.post("/chat")
    async def chat(body: ChatCompletionRequest) -> Response:
        body.sampling(lambda: 7)
        body.decoding_options()
        body.prompts_for_replica()
        return json_response({})

    @app.post("/text")
    async def text(body: CompletionRequest) -> Response:
        body.sampling(lambda: 7)
        body.decoding_options()
        body.prompts_for_replica()
        return json_response({})

    return app


APP = echo_app()


async def post(path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    transport = httpx.ASGITransport(APP)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=content, headers={"Content-Type": "application/json"})


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


UNSUPPORTED_CHAT = {
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
}
UNSUPPORTED_TEXT = {"suffix": "end"}


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED_CHAT.items())
async def test_an_unsupported_field_of_chat_is_named(field, value):
    error = error_of(await post("/chat", CHAT | {field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert f"'{field}'" in error["message"]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED_TEXT.items())
async def test_an_unsupported_field_of_completions_is_named(field, value):
    error = error_of(await post("/text", TEXT | {field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert f"'{field}'" in error["message"]


SHAPING = {
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "repetition_penalty": 1.1,
    "min_p": 0.1,
    "min_tokens": 3,
    "logit_bias": {"50": 1, "7": -2.5},
}


def test_what_shapes_the_choice_reaches_the_replica():
    sampling = ChatCompletionRequest.model_validate(CHAT | SHAPING).sampling(lambda: 0)
    found = {field: getattr(sampling, field) for field in SHAPING}
    assert found == SHAPING | {"logit_bias": ((50, 1), (7, -2.5))}
    assert CompletionRequest.model_validate(TEXT).sampling(lambda: 0).keeps_lossless is False


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.5),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("min_p", 1.5),
        ("min_tokens", -1),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(token): 1 for token in range(301)}),
    ],
)
async def test_a_value_out_of_range_is_named(field, value):
    assert error_of(await post("/chat", CHAT | {field: value}))["param"].startswith(field)


@pytest.mark.parametrize("path", ["/chat", "/text"])
async def test_an_unknown_field_is_named(path):
    error = error_of(await post(path, (CHAT if path == "/chat" else TEXT) | {"stopp": "x"}))
    assert (error["param"], error["code"]) == ("stopp", "unknown_parameter")
    assert "stopp" in error["message"]


NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "store": False,
    "user": "somebody",
    "safety_identifier": "abc",
    "metadata": {"a": "b"},
    "stop": None,
    "max_tokens": None,
    "seed": None,
    "stream": None,
    "stream_options": None,
    "decoding": None,
    "timeout_s": None,
}


@pytest.mark.parametrize(("field", "value"), NEUTRAL.items())
async def test_a_neutral_value_is_accepted(field, value):
    assert (await post("/chat", CHAT | {field: value})).status_code == 200
    assert (await post("/text", TEXT | {field: value})).status_code == 200


@pytest.mark.parametrize(
    "field", ["n", "tools", "response_format", "logprobs", "audio", "top_logprobs", "user"]
)
async def test_null_is_accepted(field):
    assert (await post("/chat", CHAT | {field: None})).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "service_tier": "auto",
    }.items(),
)
async def test_a_neutral_value_of_chat_is_accepted(field, value):
    assert (await post("/chat", CHAT | {field: value})).status_code == 200


BAD = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_k", 1.5),
    ("seed", 2**63),
    ("seed", 1.5),
    ("max_tokens", -1),
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("priority", 1.5),
    ("priority", 1001),
    ("max_tokens", "many"),
    ("max_tokens", True),
    ("stop", 7),
    ("stop", ["x"] * 17),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("ignore_eos", 1),
    ("timeout_s", 0),
    ("timeout_s", 1e9),
    ("metadata", "a"),
    ("user", 5),
    ("model", 5),
    ("decoding", "ar"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
async def test_a_bad_value_is_named(field, value):
    assert error_of(await post("/chat", CHAT | {field: value}))["param"] == field
    assert error_of(await post("/text", TEXT | {field: value}))["param"] == field


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": "x" * 257}, "stop[0]"),
        ({"stop": "\ud800"}, "stop[0]"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"decoding": {"trace": True}}, "decoding.trace"),
        ({"stream": True, "decoding": {"trace": 1}}, "decoding.trace"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": "yes"}},
            "stream_options.continuous_usage_stats",
        ),
        ({"decoding": {"mode": "fast"}}, "decoding.mode"),
        ({"decoding": {"modes": "ar"}}, "decoding.modes"),
        ({"decoding": {"block_length": 1}}, "decoding.block_length"),
        ({"decoding": {"block_length": 65}}, "decoding.block_length"),
        ({"decoding": {"threshold": 0}}, "decoding.threshold"),
        ({"decoding": {"lossless": "yes"}}, "decoding.lossless"),
        ({"decoding": {"mode": "diffusion", "lossless": True}}, "decoding.lossless"),
        ({"decoding": {"mode": "ar", "block_length": 8}}, "decoding.block_length"),
        ({"decoding": {"mode": "ar", "threshold": 0.5}}, "decoding.threshold"),
        ({"decoding": {"factor": 0}}, "decoding.factor"),
        ({"decoding": {"factor": 66}}, "decoding.factor"),
        ({"decoding": {"mode": "self_speculation", "factor": 0.5}}, "decoding.factor"),
        ({"decoding": {"mode": "diffusion", "threshold": 0.5, "factor": 0.5}}, "decoding.factor"),
        ({"decoding": {"risk": 0}}, "decoding.risk"),
        ({"decoding": {"risk": 65}}, "decoding.risk"),
        ({"decoding": {"mode": "ar", "risk": 0.1}}, "decoding.risk"),
        ({"decoding": {"threshold": 0.5, "risk": 0.1}}, "decoding.risk"),
        ({"decoding": {"mode": "diffusion", "factor": 0.5, "risk": 0.1}}, "decoding.risk"),
        ({"decoding": {"lossless": True, "risk": 0.1}}, "decoding.risk"),
        ({"decoding": {"quality": BOUND, "risk": 0.1}}, "decoding.risk"),
        ({"decoding": {"mode": "self_speculation", "threshold": 0.5}}, "decoding.threshold"),
        ({"decoding": {"lossless": True, "threshold": 0.5}}, "decoding.threshold"),
        ({"decoding": {"quality": "best"}}, "decoding.quality"),
        ({"decoding": {"quality": 0.01}}, "decoding.quality"),
        ({"decoding": {"quality": {}}}, "decoding.quality.max_differing"),
        ({"decoding": {"quality": {"max_differing": 0}}}, "decoding.quality.max_differing"),
        ({"decoding": {"quality": {"max_differing": "0.1"}}}, "decoding.quality.max_differing"),
        ({"decoding": {"quality": {"max_differing": 0.1, "min": 1}}}, "decoding.quality.min"),
        ({"decoding": {"quality": "any", "lossless": True}}, "decoding.quality"),
        ({"decoding": {"quality": BOUND, "lossless": True}}, "decoding.quality"),
        ({"decoding": {"quality": BOUND, "mode": "diffusion"}}, "decoding.quality"),
        ({"decoding": {"quality": "lossless", "mode": "diffusion"}}, "decoding.quality"),
        ({"decoding": {"quality": "lossless", "threshold": 0.5}}, "decoding.threshold"),
        ({"decoding": {"quality": BOUND, "threshold": 0.5}}, "decoding.threshold"),
        ({"decoding": {"quality": BOUND, "factor": 0.5}}, "decoding.factor"),
        ({"decoding": {"quality": BOUND, "block_length": 8}}, "decoding.block_length"),
        ({"decoding": {"quality": BOUND, "max_steps": 8}}, "decoding.max_steps"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "nam": "n"}]}, "messages[0].nam"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "messages[0].content",
        ),
    ],
)
async def test_the_place_of_a_fault_is_named(body, param):
    assert error_of(await post("/chat", CHAT | body))["param"] == param


@pytest.mark.parametrize(
    "prompt", [["a", 1], [[1], [-2]], [], [[]], [-1], [1.5], [True], None, 5, "\ud800", [["a"]], ["a"] * 129]
)
async def test_what_is_not_a_prompt(prompt):
    assert error_of(await post("/text", TEXT | {"prompt": prompt}))["param"] == "prompt"


@pytest.mark.parametrize(
    ("prompt", "given"),
    [
        ("Hi", ("Hi",)),
        ("", ("",)),
        ([1, 2], ((1, 2),)),
        (["Hi"], ("Hi",)),
        ([[1, 2]], ((1, 2),)),
        ([5], ((5,),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts(prompt, given):
    assert CompletionRequest.model_validate(TEXT | {"prompt": prompt}).prompts_for_replica() == given


def test_openai_defaults():
    sampling = ChatCompletionRequest.model_validate(CHAT).sampling(lambda: 42)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert (sampling.max_tokens, sampling.seed, sampling.stop) == (None, 42, ())
    assert ChatCompletionRequest.model_validate(CHAT).decoding_options() == DecodingOptions()


def test_what_is_asked_for_arrives():
    body = CHAT | {
        "max_completion_tokens": 9,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": -1,
        "stop": "END",
        "ignore_eos": True,
        "decoding": {"mode": "diffusion", "block_length": 8, "threshold": 1, "max_steps": 5},
    }
    request = ChatCompletionRequest.model_validate(body)
    sampling = request.sampling(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.0, 0.5, 3)
    assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (2**63 - 1, ("END",), True)
    assert request.decoding_options() == DecodingOptions(Mode.DIFFUSION, 8, 1.0, False, max_steps=5)
    for bound in ("threshold", "factor", "risk"):
        other = ChatCompletionRequest.model_validate(body | {"decoding": {bound: 0.02}})
        assert other.decoding_options() == DecodingOptions(**{bound: 0.02})


def test_messages_reach_the_template_as_it_knows_them():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    assert ChatCompletionRequest.model_validate(CHAT | {"messages": messages}).prompts_for_replica() == (
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "c"},
        ),
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
@pytest.mark.parametrize("path", ["/chat", "/text"])
async def test_bodies_that_are_no_json_object(path, body):
    error_of(await post(path, body))


async def test_nan_is_no_number():
    error_of(await post("/chat", b'{"model": "m", "messages": [], "temperature": NaN}'))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(categories=["L", "N", "P", "S", "Z", "C"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}))


@pytest.mark.parametrize(("path", "base"), [("/chat", CHAT), ("/text", TEXT)])
@given(odd=st.dictionaries(FIELDS | st.text(max_size=8), JSON, max_size=3))
@examples(100, suppress_health_check=[HealthCheck.too_slow])
async def test_no_value_is_a_server_error(path, base, odd):
    response = await post(path, base | odd)
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        error_of(response)


@given(where=st.sampled_from(["messages", "decoding", "stream_options"]), odd=JSON)
@examples(70)
async def test_no_nested_value_is_a_server_error(where, odd):
    nested = {
        "messages": [{"role": "user", "content": odd}],
        "decoding": {"mode": odd, "threshold": odd},
        "stream_options": {"include_usage": odd},
    }[where]
    assert (await post("/chat", CHAT | {where: nested})).status_code in (200, 400)
