"""An error names the field that was sent, whatever a replica calls it."""

import pytest

from replicas.errors import ErrorCode
from replicas.messages import Rejected
from router.api import create_app
from tests.router.conftest import in_process
from tests.router.fakes import MODEL, ScriptedReplica
from tests.router.test_api import CHAT, error_of


@pytest.mark.parametrize(
    ("path", "more", "raised", "param", "words"),
    [
        (
            "chat",
            {"max_completion_tokens": 9},
            "max_tokens",
            "max_completion_tokens",
            "max_completion_tokens",
        ),
        ("chat", {"max_tokens": 9}, "max_tokens", "max_tokens", "max_tokens"),
        ("chat", {}, "max_tokens", None, "max_tokens"),
        ("chat", {}, "prompt", "messages", ""),
        ("chat", {}, "messages[0].content", "messages[0].content", ""),
        ("text", {}, "messages", "prompt", ""),
        ("text", {"max_tokens": 9}, "max_tokens", "max_tokens", ""),
        ("text", {"logprobs": 1}, "logprobs", "logprobs", ""),
        ("chat", {"logprobs": True}, "logprobs", "logprobs", ""),
        (
            "chat",
            {"response_format": {"type": "json_object"}},
            "response_format.json_schema.schema",
            "response_format",
            "",
        ),
        (
            "chat",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
            "response_format.json_schema.schema.a.b",
            "response_format.json_schema.schema.a.b",
            "",
        ),
        ("text", {}, "decoding.mode", None, ""),
        ("text", {"decoding": {"mode": "ar"}}, "decoding.mode", "decoding.mode", ""),
        ("text", {"n": None}, "n", None, ""),
        ("text", {"n": 2}, "n", "n", ""),
        ("text", {}, "something_new", None, ""),
    ],
)
async def test_a_replicas_error_names_the_field_that_was_sent(make_door, path, more, raised, param, words):
    replica = ScriptedReplica("a")

    async def submit_refusing(request):
        return Rejected(request.request_id, ErrorCode.INVALID_REQUEST, "max_tokens is too much", raised)

    replica.submit = submit_refusing
    door = await make_door(replica)
    body = CHAT if path == "chat" else {"model": MODEL, "prompt": "Hi"}
    url = "/v1/chat/completions" if path == "chat" else "/v1/completions"
    async with in_process(create_app(door)) as client:
        for stream in (False, True):
            error = error_of(await client.post(url, json=body | more | {"stream": stream}), 400)
            assert error["param"] == param
            assert words in error["message"]


async def test_what_does_not_fit_is_named_as_it_was_sent(make_door):
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": [1] * 1024})
        error = error_of(response, 400)
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
