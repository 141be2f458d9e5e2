"""Reasoning and calls of a model that writes what it is told, all the way to the client."""

import json
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken

from replicas.engine.batch import ScheduledBatch, SegmentOutput
from replicas.engine.grammar import allows
from replicas.text import TextCodec
from router.api import create_app
from tests.replicas.codec import tiny_tokenizer
from tests.replicas.engine.scripted import EOS, ScriptedRunner
from tests.router.conftest import in_process
from tests.router.fakes import MODEL
from tests.router.stack import a_stack

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
THINKING = PLAIN + "<think>\n{# ends with </think> #}"
MISTRAL = (
    "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{# [TOOL_CALLS] [ARGS] [THINK] [/THINK] #}"
)
THINKS = {"type": "enabled"}
CONTROL = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class ToldRunner(ScriptedRunner):
    """Says the given tokens, then an end of text, in every sequence; its drafts are right now and then."""

    def __init__(self, ids: list[int]):
        super().__init__(max_context=400, num_pages=200)
        self._ids = ids
        self._begins: dict[int, int] = {}

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        outputs = []
        for segment in batch.segments:
            tokens = []
            for index in segment.wanted:
                begin = self._begins.setdefault(segment.seq_id, segment.start + index)
                place = segment.start + index - begin - (index >= segment.num_causal)
                tokens.append(self._ids[place] if place < len(self._ids) else EOS)
            if segment.num_causal:
                for place, mask in enumerate(segment.allowed):
                    tokens[place] = self.choice(tokens[place], mask)
            else:
                tokens = [t if k % 3 else 3 + k for k, t in enumerate(tokens)]
            outputs.append(SegmentOutput(tuple(tokens), (1.0,) * len(tokens)))
        return outputs

    def choice(self, token: int, mask: bytes | None) -> int:
        assert allows(mask, token), "the grammar forbids what it is told"
        return token


class ObedientRunner(ToldRunner):
    """Says in the place of a token that may not come the first that may."""

    def choice(self, token: int, mask: bytes | None) -> int:
        if mask is None or allows(mask, token):
            return token
        bits = int.from_bytes(mask, "little")
        return (bits & -bits).bit_length() - 1


def codec_of(template: str, **parsers: str) -> TextCodec:
    tokenizer = tiny_tokenizer(template)
    if template is MISTRAL:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(name, special=True) for name in CONTROL]}
        )
    return TextCodec(tokenizer, **parsers)


def put_together(lines: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": [], "end": None, "usage": None}
    for line in lines:
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line[6:])
        assert "error" not in chunk, chunk
        made["usage"] = chunk.get("usage") or made["usage"]
        for choice in chunk["choices"]:
            delta = choice["delta"]
            made["content"] += delta.get("content") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            made["reasoning_content"] += delta.get("reasoning_content", "")
            for piece in delta.get("tool_calls", ()):
                if "id" in piece:
                    made["calls"].append([piece["function"]["name"], ""])
                made["calls"][piece["index"]][1] += piece["function"]["arguments"]
            made["end"] = choice["finish_reason"] or made["end"]
    return made


async def answers(
    codec: TextCodec, said: str, runner: type[ToldRunner] = ToldRunner, **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer, not streamed and streamed."""
    ids = codec._backend.encode(said, add_special_tokens=False).ids
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0} | more
    async with a_stack([runner(ids)], codec=codec) as stack:
        app = create_app(stack.door)
        async with in_process(app) as client:
            whole = await client.post("/v1/chat/completions", json=body)
            assert whole.status_code == 200, whole.text
            options = {"stream": True, "stream_options": {"include_usage": True}}
            streamed: httpx.Response = await client.post("/v1/chat/completions", json=body | options)
        await stack.settled()
    return whole.json(), put_together(streamed.text.splitlines())


@pytest.mark.parametrize("mode", ["ar", "self_speculation"])
@pytest.mark.parametrize("is_in_prompt", [True, False])
async def test_reasoning_comes_apart_and_is_counted(mode: str, is_in_prompt: bool) -> None:
    codec = codec_of(THINKING if is_in_prompt else PLAIN, reasoning_parser="think")
    said = ("" if is_in_prompt else "<think>\n") + "Well, 1 < 2.\n</think>\n\nYes: 1 < 2 "
    whole, streamed = await answers(codec, said, decoding={"mode": mode})
    (choice,) = whole["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("Well, 1 < 2.", "Yes: 1 < 2 ")
    assert message["reasoning"] == message["reasoning_content"]
    assert choice["finish_reason"] == "stop"
    num = said.index("</think>") + len("</think>")  # a byte is a token
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": num}
    assert (streamed["reasoning_content"], streamed["content"]) == ("Well, 1 < 2.", "Yes: 1 < 2 ")
    assert streamed["usage"] == whole["usage"] | {
        "prompt_tokens_details": streamed["usage"]["prompt_tokens_details"]
    }


async def test_without_marks_a_model_has_no_reasoning_tokens() -> None:
    whole, _ = await answers(codec_of(PLAIN), "<think>a</think>b")
    assert whole["choices"][0]["message"]["content"] == "<think>a</think>b"
    assert "completion_tokens_details" not in whole["usage"]
    whole, _ = await answers(codec_of(THINKING, reasoning_parser="none"), "a</think>b")
    assert whole["choices"][0]["message"]["content"] == "a</think>b"


async def test_json_comes_after_reasoning() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes"]}}}
    whole, streamed = await answers(codec_of(THINKING), 'Hm, "no"?</think>"yes"', response_format=schema)
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ('Hm, "no"?', '"yes"')
    assert streamed["content"] == '"yes"'


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_control_tokens_open_calls_and_their_spelling_does_not(choice: str) -> None:
    """Behind reasoning and text that only spells the tags, as far as the choice lets there be text."""
    codec = codec_of(MISTRAL)
    assert codec.chats.calls is not None
    assert (codec.chats.calls.name, len(codec.chats.shown)) == ("mistral", 4)
    text = "Look: " if choice == "auto" else ""
    said = f"[THINK]Hm.[/THINK]{text}[TOOL_CALLS]f[ARGS]{{}}[TOOL_CALLS]f[ARGS]{{}}"
    whole, streamed = await answers(codec, said, tools=[TOOL], tool_choice=choice)
    (made,) = whole["choices"]
    assert made["finish_reason"] == streamed["end"] == "tool_calls"
    message = made["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", text.strip() or None)
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": "{}"}] * 2
    assert streamed["calls"] == [["f", "{}"], ["f", "{}"]]
    assert streamed["content"] == text.strip()
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] in (4, 5)


async def test_a_stop_string_may_end_what_has_control_tokens_in_it() -> None:
    whole, streamed = await answers(
        codec_of(MISTRAL), "[THINK]Hm.[/THINK]Look: this. Not that", tools=[TOOL], stop=["this"]
    )
    (made,) = whole["choices"]
    assert (made["message"]["content"], made["finish_reason"]) == ("Look: ", "stop")
    assert streamed["content"] == "Look: "


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"regex": "(yes|no)/[0-9]"}, "yes/7"),
        ({"choice": ["yes", "no"]}, "no"),
        ({"grammar": 'start: "y" TAIL\nTAIL: /[es]+/'}, "yes"),
        ({"json_object": True, "whitespace_pattern": " {0,2}"}, '{  "a":1}'),
    ],
)
async def test_every_form_of_an_answer_comes_after_reasoning(form: dict[str, Any], said: str) -> None:
    whole, streamed = await answers(codec_of(THINKING), f"Hm, maybe.</think>{said}", structured_outputs=form)
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, maybe.", said)
    assert streamed["content"] == said


@pytest.mark.parametrize("shows", [False, True])
async def test_a_tag_out_of_its_place_is_a_control_token_like_others(shows: bool) -> None:
    said = "[THINK]Hm.[/THINK]Look[/THINK]: [TOOL_CALLS]this."
    whole, streamed = await answers(codec_of(MISTRAL), said, skip_special_tokens=not shows)
    content = "Look[/THINK]: [TOOL_CALLS]this." if shows else "Look: this."
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", content)
    assert streamed["content"] == content


@pytest.mark.parametrize("interval", [1, 3, 50])
async def test_calls_and_reasoning_come_whole_at_any_stream_interval(interval: int) -> None:
    codec = codec_of(MISTRAL)
    said = "[THINK]Hm.[/THINK]Look: [TOOL_CALLS]f[ARGS]{}"
    ids = codec._backend.encode(said, add_special_tokens=False).ids
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0,
        "tools": [TOOL],
    }
    async with a_stack([ToldRunner(ids)], codec=codec) as stack:
        async with in_process(create_app(stack.door)) as client:
            body |= {"stream": True, "stream_interval": interval}
            streamed: httpx.Response = await client.post("/v1/chat/completions", json=body)
        await stack.settled()
    made = put_together(streamed.text.splitlines())
    assert (made["reasoning_content"], made["content"]) == ("Hm.", "Look:")
    assert (made["calls"], made["end"]) == ([["f", "{}"]], "tool_calls")


async def test_tools_go_with_no_form_but_response_format() -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL]}
    async with a_stack(codec=codec_of(PLAIN)) as stack, in_process(create_app(stack.door)) as client:
        for field, value in (("structured_outputs", {"regex": "a"}), ("bad_words", ["a"])):
            refused = await client.post("/v1/chat/completions", json=body | {field: value})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == field


@pytest.mark.parametrize("mode", ["ar", "self_speculation", "auto"])
@pytest.mark.parametrize(
    "budget", [{"thinking_token_budget": 5}, {"thinking": THINKS | {"budget_tokens": 5}}]
)
async def test_reasoning_ends_at_its_budget(mode: str, budget: dict[str, Any]) -> None:
    said = "y" * 13 + "And so: 1 < 2."  # of which the mark takes the place of eight
    whole, streamed = await answers(
        codec_of(THINKING), said, ObedientRunner, decoding={"mode": mode}, **budget
    )
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("yyyyy", "And so: 1 < 2.")
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5 + len("</think>")}
    assert (streamed["reasoning_content"], streamed["content"]) == ("yyyyy", "And so: 1 < 2.")


async def test_a_budget_cuts_a_block_of_diffusion() -> None:
    """The runner says what comes by its place alone, so what it says behind the mark is another thing."""
    whole, streamed = await answers(
        codec_of(THINKING),
        "y" * 13 + "And so: 1 < 2.",
        ObedientRunner,
        decoding={"mode": "diffusion"},
        thinking_token_budget=5,
    )
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] == streamed["reasoning_content"] == "yyyyy"
    assert message["content"] == streamed["content"] != ""
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5 + len("</think>")}


@pytest.mark.parametrize("mode", ["ar", "self_speculation", "diffusion"])
async def test_a_budget_of_nothing_closes_at_once_before_a_call(mode: str) -> None:
    whole, streamed = await answers(
        codec_of(MISTRAL),
        "[THINK]" + "Hm. " * 20,
        ObedientRunner,
        thinking_token_budget=0,
        tools=[TOOL],
        tool_choice="required",
        decoding={"mode": mode},
    )
    message = whole["choices"][0]["message"]
    assert message.get("reasoning_content") is None
    assert message["tool_calls"][0]["function"]["name"] == "f"
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert streamed["calls"][0][0] == "f"


async def test_a_budget_that_is_not_used_up_changes_nothing() -> None:
    for budget in (-1, 12, 100):
        whole, _ = await answers(codec_of(THINKING), "Well, 1 < 2.</think>Yes", thinking_token_budget=budget)
        message = whole["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Well, 1 < 2.", "Yes")


async def test_a_text_completion_that_goes_on_in_reasoning_is_bounded_too() -> None:
    codec = codec_of(MISTRAL)
    ids = codec._backend.encode("y" * 30, add_special_tokens=False).ids
    prompts = [codec._backend.encode(text, add_special_tokens=False).ids for text in ("a[THINK]", "a")]
    body = {"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    async with a_stack([ObedientRunner(ids)], codec=codec) as stack:
        async with in_process(create_app(stack.door)) as client:
            answer = await client.post("/v1/completions", json=body | {"thinking_token_budget": 3})
        await stack.settled()
    bounded, free = (choice["token_ids"] for choice in answer.json()["choices"])
    assert bounded == [*ids[:3], codec._special_ids["[/THINK]"], *ids[4:12]]
    assert free == ids[:12]


async def test_a_model_that_does_not_reason_takes_anthropics_budget_and_refuses_vllms() -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    habitual = {"thinking": THINKS | {"budget_tokens": 5}, "decoding": {"mode": "diffusion"}}
    async with a_stack(codec=codec_of(PLAIN)) as stack, in_process(create_app(stack.door)) as client:
        for path in ("/v1/chat/completions", "/v1/messages"):
            assert (await client.post(path, json=body | habitual)).status_code == 200
        refused = await client.post("/v1/chat/completions", json=body | {"thinking_token_budget": 5})
        await stack.settled()
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "thinking_token_budget")
    assert "no marks of reasoning" in error["message"]
