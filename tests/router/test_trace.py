"""`decoding.trace`: each chunk says which forwards its tokens are from, over real engines."""

import json
from collections import Counter
from typing import Any

import pytest

from router.api import create_app
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import in_process
from tests.router.fakes import MODEL
from tests.router.stack import a_stack

MODES = ("ar", "self_speculation", "diffusion", "auto")


def body(mode: str, **more: Any) -> dict[str, Any]:
    base = {"model": MODEL, "prompt": "Tell me", "stream": True, "max_tokens": 40, "ignore_eos": True}
    return base | {"temperature": 0, "decoding": {"mode": mode, "trace": True}} | more


async def chunks(client, sent: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post("/v1/completions", json=sent)
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("mode", MODES)
async def test_the_trace_adds_up_to_the_text_and_the_report(mode: str) -> None:
    async with a_stack([ScriptedRunner()]) as stack, in_process(create_app(stack.door)) as client:
        *some, last = await chunks(client, body(mode))
        report = last["decoding"]
        parts = [part for chunk in some for part in chunk["decoding"]["trace"]]
        for chunk in some:
            trace = chunk["decoding"]["trace"]
            assert "".join(part["text"] for part in trace) == chunk["choices"][0]["text"]
        tokens: Counter[str] = Counter()
        for part in parts:
            tokens[part["mode"]] += part["tokens"]
        assert tokens == report["tokens"]
        forwards = [part["forward"] for part in parts]
        assert forwards == sorted(forwards)
        assert (forwards[0], forwards[-1]) == (0, report["forwards"])
        if mode == "ar":
            assert forwards == list(range(40))
        await stack.settled()


@pytest.mark.parametrize("mode", MODES)
async def test_a_trace_changes_nothing_else_and_is_there_only_where_asked(mode: str) -> None:
    async with a_stack([ScriptedRunner()]) as stack, in_process(create_app(stack.door)) as client:
        traced = await chunks(client, body(mode))
        plain = await chunks(client, body(mode, decoding={"mode": mode}))
        assert [chunk for chunk in plain[:-1] if "decoding" in chunk] == []
        texts = ["".join(c["choices"][0]["text"] for c in found[:-1]) for found in (traced, plain)]
        assert texts[0] == texts[1]
        assert traced[-1]["decoding"]["forwards"] == plain[-1]["decoding"]["forwards"]


async def test_choices_and_held_back_text_are_told_apart() -> None:
    """A stop string that never comes holds text back; each choice has forwards of its own."""
    async with a_stack([ScriptedRunner()]) as stack, in_process(create_app(stack.door)) as client:
        sent = body("ar", n=2, temperature=1, seed=3, stop=["\x00" * 8, "e" * 30])
        tokens: Counter[int] = Counter()
        for chunk in await chunks(client, sent):
            (choice,) = chunk["choices"]
            trace = chunk.get("decoding", {}).get("trace", [])
            assert "".join(part["text"] for part in trace) == choice["text"]
            tokens[choice["index"]] += sum(part["tokens"] for part in trace)
        assert tokens == {0: 40, 1: 40}


async def test_an_answer_that_is_not_streamed_has_none() -> None:
    async with a_stack([ScriptedRunner()]) as stack, in_process(create_app(stack.door)) as client:
        response = await client.post("/v1/completions", json=body("ar", stream=False))
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], "stream" in error["message"]) == ("decoding.trace", True)
