"""`/tokenize`, `/detokenize`, `/version` and `/ping`."""

import pytest

from replicas.errors import ErrorCode
from replicas.text import TextCodec
from router.api import create_app
from tests.router.conftest import in_process
from tests.router.fakes import MODEL, ScriptedReplica
from tests.router.stack import a_stack
from tests.router.test_api import error_of
from tests.router.test_tools import ASKED, TOOLS, codec, runner

__all__ = ["codec", "runner"]
CHAT = {"messages": ASKED}


async def test_tokens_are_those_of_the_completions(runner, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, in_process(create_app(stack.door)) as client:
        for body, path, more in (
            ({"prompt": "Once «née» upon\n"}, "/v1/completions", {}),
            ({"prompt": "word " * 5000}, "/v1/completions", {"truncate_prompt_tokens": 10}),
            (CHAT, "/v1/chat/completions", {}),
            (CHAT | {"tools": TOOLS}, "/v1/chat/completions", {}),
            (CHAT | {"add_generation_prompt": False}, "/v1/chat/completions", {}),
        ):
            told = (
                await client.post("/tokenize", json={"model": MODEL, "return_token_strs": True} | body)
            ).json()
            asked = body | more | {"model": MODEL, "max_tokens": 1, "return_token_ids": True}
            answer = (await client.post(path, json=asked)).json()
            ids = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
            assert told["tokens"][-10:] == ids[-10:]
            assert more or told["tokens"] == ids
            assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
            assert told["max_model_len"] == stack.replicas[0].engine.spec.max_context
            text = (await client.post("/detokenize", json={"tokens": told["tokens"]})).json()["prompt"]
            if "prompt" in body:
                assert text.endswith(body["prompt"])
        empty = (await client.post("/tokenize", json={"prompt": "", "add_special_tokens": False})).json()
        assert (empty["count"], empty["tokens"], empty["token_strs"]) == (0, [], None)
        assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
        await stack.settled()


async def test_special_tokens_are_added_where_asked(make_door) -> None:
    replica = ScriptedReplica("a")
    async with in_process(create_app(await make_door(replica))) as client:
        for body in ({"prompt": "x"}, {"prompt": "x", "add_special_tokens": False}, CHAT):
            assert (await client.post("/tokenize", json=body)).status_code == 200
        more = {"add_special_tokens": True, "chat_template_kwargs": {"a": 1}, "reasoning_effort": "none"}
        assert (await client.post("/tokenize", json=CHAT | more)).status_code == 200
    assert [asked.adds_special_tokens for asked in replica.asked] == [True, False, False, True]
    assert replica.asked[-1].template.kwargs == (
        '{"reasoning_effort": "none", "enable_thinking": false, "a": 1}'
    )


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/tokenize", {}, "prompt", "messages"),
        ("/tokenize", {"prompt": 3}, "prompt", "string"),
        ("/tokenize", CHAT | {"prompt": "x"}, "messages", "prompt"),
        ("/tokenize", {"prompt": "x", "tools": TOOLS}, "tools", "messages"),
        ("/tokenize", CHAT | {"tools": [*TOOLS, *TOOLS]}, "tools[2].function.name", "rename"),
        ("/tokenize", {"messages": [{"role": "x"}]}, "messages[0].role", "user"),
        ("/tokenize", {"prompt": "x", "promt": "y"}, "promt", "Unknown"),
        ("/tokenize", {"prompt": "x" * 1_000_001}, "prompt", "1000000"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens", "boolean"),
        ("/detokenize", {}, "tokens", "Missing"),
        ("/detokenize", {"tokens": "x"}, "tokens", "token ids"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "from 0"),
        ("/detokenize", {"tokens": [500]}, "tokens", "499"),
        ("/detokenize", {"tokens": [[1]]}, "tokens", "token ids"),
    ],
)
async def test_what_is_wrong_is_named(make_door, path: str, body: dict, param: str, says: str) -> None:
    async with in_process(create_app(await make_door(ScriptedReplica("a")))) as client:
        error = error_of(await client.post(path, json=body), 400)
        assert error["param"] == param
        assert says in error["message"]
        error_of(await client.post(path, json={"prompt": "x", "tokens": [1]} | {"model": "gpt"}), 400)


async def test_the_tokenizer_is_described(make_door, runner, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, in_process(create_app(stack.door)) as client:
        told = (await client.get("/tokenizer_info")).json()
        assert told["tokenizer_class"]
        assert told["model_max_length"] == stack.replicas[0].engine.spec.max_context
        assert told["vocab_size"] == len(codec._tokenizer)
        assert told["chat_template"] == codec._tokenizer.chat_template
        names = {told[name] for name in ("bos_token", "eos_token", "pad_token") if name in told}
        assert "eos_token" in told
        assert names | set(told["additional_special_tokens"]) <= set(codec._special_ids)
    async with in_process(create_app(await make_door())) as client:
        error_of(await client.get("/tokenizer_info"), 503)


async def test_another_replica_answers_for_one_that_is_lost(make_door) -> None:
    lost, busy, well = ScriptedReplica("a"), ScriptedReplica("b"), ScriptedReplica("c")
    busy.refusal = ErrorCode.QUEUE_FULL, "too many"
    door = await make_door(lost, busy, well)
    lost.is_up = False
    async with in_process(create_app(door)) as client:
        for _ in range(8):
            assert (await client.post("/detokenize", json={"tokens": [72, 105]})).json() == {"prompt": "Hi"}
        well.refusal = ErrorCode.QUEUE_FULL, "too many"
        assert error_of(await client.post("/tokenize", json={"prompt": "x"}), 429)["code"] == "queue_full"
        well.refusal = busy.refusal = ErrorCode.INVALID_REQUEST, "no template"
        lost.is_up = True
        lost.refusal = well.refusal
        error_of(await client.post("/tokenize", json=CHAT), 400)
    async with in_process(create_app(await make_door())) as client:
        error_of(await client.post("/tokenize", json={"prompt": "x"}), 503)
        error_of(await client.post("/detokenize", json={"tokens": [1]}), 503)


async def test_version_and_ping(make_door) -> None:
    async with in_process(create_app(await make_door())) as client:
        assert (await client.get("/version")).json()["version"].count(".") == 2
        for method in ("GET", "POST", "HEAD"):
            response = await client.request(method, "/ping")
            assert (response.status_code, response.content) == (200, b"")
