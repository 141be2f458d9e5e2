"""Where each token of a completion begins in its text: for every choice, streamed or whole, cut or not."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from replicas.engine.batch import ScheduledBatch, SegmentOutput
from router.api import create_app
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import in_process
from tests.router.fakes import MODEL
from tests.router.stack import a_stack
from tests.router.test_sse import events


class Sure(ScriptedRunner):
    """Tells what else might have come."""

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        outputs = super().run(batch)
        return [replace(output, top=(((5, -0.5), (6, -0.7)),) * len(output.token_ids)) for output in outputs]


BODY = {"model": MODEL, "max_tokens": 40, "ignore_eos": True, "temperature": 1, "seed": 3, "logprobs": 2}


async def choices(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """text and logprobs by index, the same whether streamed or whole."""
    whole = (await client.post("/v1/completions", json=body)).json()
    found = {choice["index"]: choice for choice in whole["choices"]}
    response = await client.post("/v1/completions", json=body | {"stream": True})
    streamed: dict[int, dict[str, Any]] = {}
    for chunk in events(response.content)[:-1]:
        (choice,) = chunk["choices"]
        so_far = streamed.setdefault(choice["index"], {"text": "", "offsets": [], "tokens": []})
        so_far["text"] += choice["text"]
        if choice["logprobs"] is not None:
            so_far["offsets"] += choice["logprobs"]["text_offset"]
            so_far["tokens"] += choice["logprobs"]["tokens"]
    for index, choice in found.items():
        logprobs = choice["logprobs"]
        assert streamed[index] == {
            "text": choice["text"],
            "offsets": logprobs["text_offset"],
            "tokens": logprobs["tokens"],
        }
    return found


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "Hi"},
        {"prompt": "Hi", "n": 3},
        {"prompt": ["Hi", "A longer one"], "n": 2},
        {"prompt": [[5, 6, 7], "née"]},
        {"prompt": "Hi", "n": 2, "stop": ["A", "7", ")"]},
        {"prompt": "Hi", "decoding": {"mode": "self_speculation", "block_length": 4}},
    ],
    ids=json.dumps,
)
async def test_each_token_begins_where_its_offset_says(more: dict[str, Any]) -> None:
    async with a_stack([Sure()]) as stack, in_process(create_app(stack.door)) as client:
        for choice in (await choices(client, BODY | more)).values():
            text, logprobs = choice["text"], choice["logprobs"]
            offsets, tokens = logprobs["text_offset"], logprobs["tokens"]
            assert len(offsets) == len(tokens) == len(logprobs["token_logprobs"])
            assert offsets[0] == 0
            assert offsets == sorted(offsets)
            assert all(offset < len(text) for offset in offsets)
            ends = [*offsets[1:], len(text)]
            for token, start, end in zip(tokens, offsets, ends, strict=True):
                assert token.startswith(text[start:end])  # an end of text has none
            assert "".join(token for token in tokens if token != "<eos>") == text
        await stack.settled()
