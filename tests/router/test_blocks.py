"""Reasoning, text and calls as blocks: a stream put together is the whole answer, however it was cut."""

import itertools
import json
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.messages import DecodingReport, Delta, Finished, FinishReason, ToolCallDelta
from router.answer import Counts
from router.api import create_app
from router.apis.messages import MessageAnswer
from router.apis.responses import ResponseAnswer
from router.deltas import joined
from tests.router.conftest import in_process, running
from tests.router.fakes import MODEL, ScriptedReplica
from tests.router.test_responses_api import events_of

FINISHED = Finished("x", 7, 10, DecodingReport(), num_reused_tokens=3, num_reasoning_tokens=2)
CALLS = [
    ToolCallDelta(0, "", "call_a", "f"),
    ToolCallDelta(0, '{"a":'),
    ToolCallDelta(0, "1}"),
    ToolCallDelta(1, "", "call_b", "g"),
    ToolCallDelta(1, "{}"),
]


@st.composite
def deltas(draw: st.DrawFn) -> list[Delta]:
    found = [Delta("x", "", 1, reasoning=part) for part in draw(st.lists(st.sampled_from("rst")))]
    found += [Delta("x", part, 1) for part in draw(st.lists(st.sampled_from(["a", "«", "b "])))]
    found += [Delta("x", "", 1, tool_calls=(call,)) for call in draw(st.sampled_from([[], CALLS[:3], CALLS]))]
    reason = FinishReason.TOOL_CALLS if found and found[-1].tool_calls else FinishReason.STOP
    return [*found, Delta("x", "", 1, reason=draw(st.sampled_from([reason, FinishReason.LENGTH])))]


def streamed(answer: Any, parts: list[Delta], cuts: list[int]) -> str:
    bounds = sorted({0, len(parts) - 1, *(cut % len(parts) for cut in cuts)})
    sent = answer.head(Counts(7))
    for begin, end in itertools.pairwise(bounds):
        sent += answer.delta(joined(parts[begin:end]), Counts(7, end))
    return (sent + answer.tail(parts[-1], FINISHED)).decode()


@given(deltas(), st.lists(st.integers(0, 50), max_size=5))
def test_a_streamed_response_is_the_whole_one(parts: list[Delta], cuts: list[int]) -> None:
    whole = ResponseAnswer("resp_1", MODEL, 1).whole([joined(parts)], FINISHED)
    events = events_of(streamed(ResponseAnswer("resp_1", MODEL, 1), parts, cuts))
    told = events[-1]["response"]
    assert told["output"] == whole["output"]
    assert told["status"] == whole["status"]
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == whole["output"]
    for index, item in enumerate(whole["output"]):
        grown = [e["delta"] for e in events if e["type"].endswith(".delta") and e["output_index"] == index]
        assert "".join(grown) == (item["arguments"] if "arguments" in item else item["content"][0]["text"])


@given(deltas(), st.lists(st.integers(0, 50), max_size=5))
def test_a_streamed_message_is_the_whole_one(parts: list[Delta], cuts: list[int]) -> None:
    whole = json.loads(MessageAnswer("msg_1", MODEL, 1).whole_json([joined(parts)], FINISHED))
    text = streamed(MessageAnswer("msg_1", MODEL, 1), parts, cuts)
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    content: list[dict[str, Any]] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(content)
                content.append({"grown": ""} | event["content_block"])
            case "content_block_delta":
                assert event["index"] == len(content) - 1
                content[-1]["grown"] += next(v for k, v in event["delta"].items() if k != "type")
    for block, expected in zip(content, whole["content"], strict=True):
        grown = block.pop("grown")
        key = {"text": "text", "thinking": "thinking", "tool_use": "input"}[block["type"]]
        assert block | {key: json.loads(grown) if key == "input" else grown} == expected
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-2]["usage"] == whole["usage"]


@pytest.mark.parametrize("second", ["{}", '{"b":'])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ('{"x":1e999}', '{"x":1e999}'),
        ('{"x":-1E+400,"y":0.10}', '{"x":-1E+400,"y":0.10}'),
        ('{"x":' + "9" * 5000 + "}", '{"x":' + "9" * 5000 + "}"),
        ('{"x":' + "[" * 5000 + "]" * 5000 + "}", '{"x":' + "[" * 5000 + "]" * 5000 + "}"),
        ('{"x":' + "[" * 5000 + "]" * 5000, "{}"),
        ('{"x":' + "[" * 5000 + "]" * 5000 + ',"y":"}', "{}"),
        ('{"x":' + "[" * 5000, "{}"),
        ('{"x":1e9', "{}"),
        ('{"input":null,"x":"\\"input\\":null"}', '{"input":null,"x":"\\"input\\":null"}'),
        ("", "{}"),
    ],
)
def test_a_messages_input_is_what_the_model_wrote(arguments: str, told: str, second: str) -> None:
    calls = ToolCallDelta(0, arguments, "call_a", "f"), ToolCallDelta(1, second, "call_b", "g")
    end = Delta("x", "", 1, reason=FinishReason.LENGTH, tool_calls=calls)
    body = MessageAnswer("msg_1", MODEL, 1).whole_json([end], FINISHED).decode()
    first = f'{{"type":"tool_use","id":"toolu_a","name":"f","input":{told}}}'
    last = '{"type":"tool_use","id":"toolu_b","name":"g","input":{}}'
    assert f'"content":[{first},{last}],' in body


def test_usage_has_what_the_sdks_read() -> None:
    end = Delta("x", "a", 1, reason=FinishReason.STOP)
    usage = MessageAnswer("msg_1", MODEL, 1).whole([end], FINISHED)["usage"]
    told = anthropic.types.Usage.model_validate(usage, strict=True)
    assert told.output_tokens_details is not None
    assert (told.output_tokens, told.output_tokens_details.thinking_tokens) == (10, 2)
    unmarked = MessageAnswer("msg_1", MODEL, 1).whole([end], replace(FINISHED, num_reasoning_tokens=None))
    assert "output_tokens_details" not in unmarked["usage"]
    usage = ResponseAnswer("resp_1", MODEL, 1).whole([end], FINISHED)["usage"]
    response = openai.types.responses.ResponseUsage.model_validate(usage, strict=True)
    details = response.input_tokens_details
    assert (details.cached_tokens, details.cache_write_tokens) == (3, 0)
    assert response.output_tokens_details.reasoning_tokens == 2


@given(deltas(), st.lists(st.integers(0, 50), max_size=5))
def test_thinking_is_left_out_of_a_message_that_omits_it(parts: list[Delta], cuts: list[int]) -> None:
    shown = MessageAnswer("msg_1", MODEL, 1).whole([joined(parts)], FINISHED)
    expected = [block | {"thinking": ""} if "thinking" in block else block for block in shown["content"]]
    whole = MessageAnswer("msg_1", MODEL, 1, omits_thinking=True).whole([joined(parts)], FINISHED)
    assert whole["content"] == expected
    text = streamed(MessageAnswer("msg_1", MODEL, 1), parts, cuts)
    omitted = streamed(MessageAnswer("msg_1", MODEL, 1, omits_thinking=True), parts, cuts)
    kept = [event for event in text.split("\n\n") if "thinking_delta" not in event]
    assert omitted.split("\n\n") == kept


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": "x" * 100_000}]}),
        ("/v1/responses", {"input": "x" * 100_000}),
        ("/tokenize", {"prompt": "x" * 100_000}),
    ],
)
async def test_a_long_body_is_read_beside_the_loop(make_door: Any, path: str, body: dict[str, Any]) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), in_process(create_app(door)) as client:
        response = await client.post(path, json=body | {"model": MODEL})
        assert response.status_code == 200, response.text
        response = await client.post(path, json=body | {"model": MODEL, "modell": "x"})
        assert response.status_code == 400
        assert "modell" in response.text
