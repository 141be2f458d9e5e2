"""Forms of answers: vLLM's names for them, what goes together, and refusals in the client's own names."""

import json

import pytest

from replicas.messages import GrammarFormat, GrammarKind, JsonFormat
from router.api import create_app
from router.schema import ChatCompletionRequest
from tests.router.conftest import in_process
from tests.router.stack import a_stack
from tests.router.test_schema import CHAT, error_of, post
from tests.router.test_shapes import chat


@pytest.fixture
async def client_of_a_stack():
    async with a_stack() as stack, in_process(create_app(stack.door)) as client:
        yield client


TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}],
    "triggers": ["<f"],
}


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"regex": "a+"}, GrammarFormat(GrammarKind.REGEX, "a+")),
        ({"choice": ["a", "b"], "regex": None}, GrammarFormat(GrammarKind.CHOICE, '["a", "b"]')),
        ({"grammar": "start: A"}, GrammarFormat(GrammarKind.LARK, "start: A")),
        ({"json": {"type": "integer"}}, JsonFormat('{"type": "integer"}', True)),
        ({"json": '{"type": "integer"}'}, JsonFormat('{"type": "integer"}', True)),
        ({"json_object": True}, JsonFormat('{"type": "object"}')),
        (
            {"json": {"type": "integer"}, "whitespace_pattern": "[ \\n]{0,4}"},
            JsonFormat('{"type": "integer"}', True, "[ \\n]{0,4}"),
        ),
    ],
)
def test_structured_outputs_have_vllms_names(given, form):
    request = ChatCompletionRequest.model_validate(CHAT | {"structured_outputs": given})
    assert request.sampling(lambda: 0).response_format == form


@pytest.mark.parametrize("tag", [TAG, json.dumps(TAG)])
def test_a_structural_tag_is_taken(tag):
    request = ChatCompletionRequest.model_validate(CHAT | {"structured_outputs": {"structural_tag": tag}})
    form = request.sampling(lambda: 0).response_format
    assert (form.kind, json.loads(form.text)) == (GrammarKind.STRUCTURAL_TAG, TAG)


def test_bad_words_are_a_form():
    request = ChatCompletionRequest.model_validate(CHAT | {"bad_words": ["a"]})
    assert request.sampling(lambda: 0).response_format == GrammarFormat(GrammarKind.WITHOUT_WORDS, '["a"]')
    assert ChatCompletionRequest.model_validate(CHAT | {"bad_words": []}).form[1] is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        (
            {"structured_outputs": {"structural_tag": {"format": {}}}},
            "structured_outputs.structural_tag.format",
        ),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "a?"}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["a"], "response_format": {"type": "json_object"}}, "bad_words"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
    ],
)
async def test_forms_that_can_not_be_meant_are_named(body, param):
    assert error_of(await post("/chat", CHAT | body))["param"] == param


async def test_forms_are_kept_to_and_refused_in_the_clients_names(client_of_a_stack):
    path = "/v1/chat/completions"
    body = chat(structured_outputs={"choice": ["YES", "NO"]})
    for mode in ("ar", "self_speculation", "auto"):
        answer = (await client_of_a_stack.post(path, json=body | {"decoding": {"mode": mode}})).json()
        assert answer["choices"][0]["message"]["content"] in ("YES", "NO")
    for form, param in (
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json"),
        ({"bad_words": ["a"], "ignore_eos": True}, "ignore_eos"),
    ):
        assert error_of(await client_of_a_stack.post(path, json=chat(**form)))["param"] == param

    schema = {"type": "integer", "minimum": 1, "maximum": 9, "not": {"const": 5}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for stream in (False, True):
        answer = await client_of_a_stack.post(path, json=chat(response_format=named, stream=stream))
        assert answer.status_code == 200, answer.text
        assert "not" in answer.headers["warning"]
    named["json_schema"]["strict"] = True
    error = error_of(await client_of_a_stack.post(path, json=chat(response_format=named)))
    assert error["param"] == "response_format.json_schema.schema"
