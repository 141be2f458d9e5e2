"""Text completions that begin with their prompt, with its log-probabilities or without."""

import pytest

from router.api import create_app
from tests.router.conftest import in_process
from tests.router.fakes import MODEL
from tests.router.stack import a_stack
from tests.router.test_shapes import streamed
from tests.router.test_text_offset import Sure


@pytest.fixture
async def client_of_a_stack():
    async with a_stack() as stack, in_process(create_app(stack.door)) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["HELLO", [30, 31, 32, 2, 33]])
@pytest.mark.parametrize("max_tokens", [0, 1, 7])
async def test_echo_has_the_prompt_with_its_logprobs(stream, prompt, max_tokens):
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "logprobs": 2, "echo": True, "n": 2}
    async with a_stack([Sure()]) as stack, in_process(create_app(stack.door)) as client:
        plain = (await client.post("/v1/completions", json=body | {"echo": False, "seed": 3})).json()
        told = {
            index: {"text": "", "tokens": [], "token_logprobs": [], "text_offset": []} for index in (0, 1)
        }
        if stream:
            for chunk in await streamed(client, "/v1/completions", body | {"seed": 3}):
                (choice,) = chunk["choices"]
                told[choice["index"]]["text"] += choice["text"]
                for name, items in (choice["logprobs"] or {}).items():
                    told[choice["index"]].setdefault(name, [])
                    told[choice["index"]][name] += items
        else:
            answer = (await client.post("/v1/completions", json=body | {"seed": 3})).json()
            assert answer["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
            for choice in answer["choices"]:
                told[choice["index"]] = {"text": choice["text"]} | choice["logprobs"]
    shown = prompt if isinstance(prompt, str) else "".join(chr(33 + i - 3) for i in prompt if i > 2)
    for index, choice in told.items():
        other = plain["choices"][index]
        assert choice["text"] == shown + other["text"]
        num_prompt = len(prompt)
        assert choice["token_logprobs"][0] is None
        assert choice["top_logprobs"][0] is None
        assert all(logprob == 0.0 for logprob in choice["token_logprobs"][1:num_prompt])
        assert len(choice["tokens"]) >= num_prompt + len(other["logprobs"]["tokens"])
        assert (
            choice["tokens"][num_prompt:][: len(other["logprobs"]["tokens"])] == other["logprobs"]["tokens"]
        )
        offsets = [len(shown) + offset for offset in other["logprobs"]["text_offset"]]
        assert choice["text_offset"][num_prompt:][: len(offsets)] == offsets
        assert choice["text_offset"][0] == 0


async def test_echo_lists_the_end_of_text_as_a_token():
    """Whoever scores cuts the one token that was made off the end of the lists, so it is always there."""
    ends = 0
    async with a_stack([Sure()]) as stack, in_process(create_app(stack.door)) as client:
        for number in range(120):
            prompt = [5, 6 + number // 40, 7 + number % 40]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True}
            body["temperature"] = 0
            answer = (await client.post("/v1/completions", json=body)).json()["choices"][0]
            assert len(answer["logprobs"]["tokens"]) == 4
            ends += answer["finish_reason"] == "stop"
    assert ends


async def test_echo_without_logprobs_is_text_alone(client_of_a_stack):
    body = {"model": MODEL, "prompt": "HELLO", "max_tokens": 0, "echo": True}
    answer = (await client_of_a_stack.post("/v1/completions", json=body)).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["logprobs"]) == ("HELLO", None)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
