"""What one API key has asked is nothing that another can learn from its own answers."""

import pytest

from router.api import create_app
from router.auth import ApiKey, KeyRing, digest_of, new_key
from router.config import IngressConfig
from router.prefix_map import CHUNK_CHARS, PrefixMap, prefix_keys
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import in_process
from tests.router.fakes import MODEL
from tests.router.stack import a_stack

ONE, TWO = new_key(), new_key()
RING = KeyRing((ApiKey("one", digest_of(ONE)), ApiKey("two", digest_of(TWO))))


async def cached(client, key: str | None, prompt: str) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2}
    response = await client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("is_shared", [False, True])
async def test_each_key_has_a_prefix_cache_of_its_own_unless_configured_otherwise(is_shared):
    async with (
        a_stack([ScriptedRunner()], keys=RING, config=IngressConfig(shared_prefix_cache=is_shared)) as stack,
        in_process(create_app(stack.door)) as client,
    ):
        secret = "the merger is on Monday " * 2
        assert await cached(client, ONE, secret) == 0
        assert await cached(client, ONE, secret) > 0
        assert (await cached(client, TWO, secret) > 0) == is_shared
        assert await cached(client, TWO, secret) > 0


async def test_without_keys_all_share_one():
    async with a_stack([ScriptedRunner()]) as stack, in_process(create_app(stack.door)) as client:
        assert await cached(client, None, "as everybody begins " * 2) == 0
        assert await cached(client, None, "as everybody begins " * 2) > 0


def test_a_router_looks_for_a_prompt_where_it_went_under_its_own_salt():
    prefixes = PrefixMap()
    text = "x" * (4 * CHUNK_CHARS)
    prefixes.sent(prefix_keys(text, "one"), "a", 0.0)
    assert prefixes.held(prefix_keys(text, "one"), 0.0) == {"a": 1.0}
    assert prefixes.held(prefix_keys(text, "two"), 0.0) == {}
    assert prefixes.held(prefix_keys(text), 0.0) == {}
