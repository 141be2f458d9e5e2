"""The OpenAPI document against what the door takes and sends."""

import jsonschema
import pytest

from policies.control.policy_setting import PolicyChoice, PolicyWatch
from router.api import create_app
from router.metrics import Metrics
from tests.router import test_messages as messages
from tests.router import test_responses_api as responses
from tests.router.conftest import in_process
from tests.router.fakes import MODEL, FakeStore
from tests.router.test_api import CHAT


async def test_the_openapi_document_can_be_made(make_door):
    async with in_process(create_app(await make_door())) as client:
        document = (await client.get("/openapi.json")).json()
        assert (await client.get("/docs")).status_code == 404  # they would need a foreign host
    assert "decoding" in document["components"]["schemas"]["ChatCompletionRequest"]["properties"]


async def test_the_openapi_document_is_true(make_door):
    """Bodies that are taken are valid by it, others are not; errors and streams are those that are sent."""
    # Of a cluster: some routes are there alone.
    policy = PolicyWatch(FakeStore(), PolicyChoice("threshold"), lambda policy: None)
    async with in_process(create_app(await make_door(policy=policy, metrics=Metrics(MODEL, "i")))) as client:
        document = (await client.get("/openapi.json")).json()
    for operations in document["paths"].values():
        assert all("422" not in operation["responses"] for operation in operations.values())
    for path in ("/v1/responses", "/v1/messages"):
        answers = document["paths"][path]["post"]["responses"]
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    paths = {"/tokenize", "/detokenize", "/version", "/ping", "/metrics", "/v1/triad/policy"}
    assert set(document["paths"]) >= paths
    assert set(document["paths"]["/v1/triad/policy"]["put"]["responses"]) >= {
        "200",
        "400",
        "401",
        "403",
        "503",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(chat) >= {"400", "401", "404", "408", "413", "415", "429", "503", "504"}
    assert document["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"

    schema = {"$ref": "#/components/schemas/ChatCompletionRequest", "components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    parts = [{"type": "text", "text": "Hi", "cache_control": {}}]
    for more in (
        {},
        {"stop": "END"},
        {"stop": ["a", "b"]},
        {"messages": [{"role": "user", "content": parts}]},
        {"tools": None},
        {"tools": []},
        {"tool_choice": "none"},
    ):
        assert validator.is_valid(CHAT | more), more
    for more in ({"stop": 3}, {"audio": {}}, {"stopp": "x"}, {"functions": [{}]}):
        assert not validator.is_valid(CHAT | more), more


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        (
            "ResponsesRequest",
            [
                {"model": "m", "input": "Hi"},
                {"model": "m", "input": responses.HISTORY, "tools": responses.TOOLS},
            ],
            [{"model": "m"}, {"model": "m", "input": 3}],
        ),
        (
            "MessagesRequest",
            [messages.BODY, messages.BODY | {"messages": [messages.CALLED], "tools": messages.TOOLS}],
            [{"model": "m"}, messages.BODY | {"max_tokens": "3"}],
        ),
        ("TokenizeBody", [{"prompt": "x"}], [{"prompt": 3}]),
    ],
)
async def test_further_bodies_are_described(make_door, name: str, taken: list, refused: list) -> None:
    async with in_process(create_app(await make_door())) as client:
        document = (await client.get("/openapi.json")).json()
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    for body in taken:
        assert list(validator.iter_errors(body)) == []
    assert not any(map(validator.is_valid, refused))
