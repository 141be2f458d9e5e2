"""A request's bound on quality, from its body to the plan that its replica runs."""

import pytest

from policies.modes import DecodePlan, Mode
from replicas.messages import DecodingOptions
from router.api import create_app
from router.schema import ChatCompletionRequest
from tests.replicas.engine.test_quality import YIELDS
from tests.router.conftest import in_process
from tests.router.fakes import MODEL
from tests.router.stack import a_stack

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        ({"quality": "any"}, DecodingOptions()),
        ({"quality": "lossless"}, DecodingOptions(lossless=True)),
        ({"quality": "lossless", "lossless": True}, DecodingOptions(lossless=True)),
        ({"quality": {"max_differing": 1}}, DecodingOptions(max_differing=1.0)),
        ({"quality": {"max_differing": 0.01}, "mode": "ar"}, DecodingOptions(Mode.AR, max_differing=0.01)),
        ({"quality": "lossless", "block_length": 8}, DecodingOptions(block_length=8, lossless=True)),
    ],
)
def test_quality_is_a_word_or_a_bound(decoding: dict[str, object], expected: DecodingOptions) -> None:
    request = ChatCompletionRequest.model_validate(CHAT | {"decoding": decoding})
    assert request.decoding_options() == expected


@pytest.mark.parametrize(
    ("quality", "mode"),
    [
        ("any", Mode.DIFFUSION),
        ({"max_differing": 0.05}, Mode.DIFFUSION),
        ({"max_differing": 0.01}, Mode.SELF_SPECULATION),
        ("lossless", Mode.SELF_SPECULATION),
    ],
)
async def test_the_replica_keeps_what_the_body_asks_for(quality: object, mode: Mode) -> None:
    async with a_stack() as stack, in_process(create_app(stack.door)) as client:
        replica = stack.replicas[0]
        replica.engine.set_yields(YIELDS)
        replica.service.set_plan(DecodePlan(Mode.DIFFUSION, 8), "test")
        body = {"model": MODEL, "prompt": "Hi", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
        response = await client.post("/v1/completions", json=body | {"decoding": {"quality": quality}})
        assert response.status_code == 200, response.text
        assert set(response.json()["decoding"]["tokens"]) == {mode}
