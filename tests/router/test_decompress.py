"""Compressed bodies: read, bounded, or refused by name."""

import gzip
import json
import random
import tracemalloc

import pytest

from router.api import create_app
from router.config import IngressConfig
from tests.router.conftest import in_process, running
from tests.router.fakes import TEXT, ScriptedReplica
from tests.router.test_api import CHAT, error_of

PATH = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


async def post(make_door, body: bytes, encoding: str, **bounds):
    replica = ScriptedReplica("a")
    door = await make_door(replica, config=IngressConfig(**bounds))
    async with running(replica.run()), in_process(create_app(door)) as client:
        return await client.post(PATH, content=body, headers=JSON | {"Content-Encoding": encoding})


@pytest.mark.parametrize("encoding", ["gzip", "GZip", "x-gzip"])
async def test_a_gzip_body_is_read(make_door, encoding):
    answer = await post(make_door, gzip.compress(json.dumps(CHAT).encode(), mtime=0), encoding)
    assert answer.json()["choices"][0]["message"]["content"] == TEXT


async def test_a_long_gzip_body_is_read(make_door):
    rng = random.Random(1)
    long = CHAT | {"user": "".join(chr(rng.randrange(32, 127)) for _ in range(300_000))}
    assert (
        await post(make_door, gzip.compress(json.dumps(long).encode(), mtime=0), "gzip")
    ).status_code == 200


async def test_identity_is_nothing(make_door):
    assert (await post(make_door, json.dumps(CHAT).encode(), "identity")).status_code == 200


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip"])
async def test_another_encoding_is_a_415(make_door, encoding):
    error = error_of(await post(make_door, b"x", encoding), 415)
    assert error["code"] == "unsupported_encoding"
    assert encoding in error["message"]


WHOLE = gzip.compress(json.dumps(CHAT).encode(), mtime=0)


@pytest.mark.parametrize(
    "body", [b"", b"{}", WHOLE[:-1], WHOLE[:20], WHOLE + b"x", WHOLE[:12] + b"\xff" * 30]
)
async def test_what_is_no_gzip_is_a_400(make_door, body):
    assert error_of(await post(make_door, body, "gzip"), 400)["code"] == "invalid_body"


async def test_a_bomb_is_a_413_and_takes_no_memory(make_door):
    bomb = gzip.compress(b" " * 200_000_000, mtime=0)
    tracemalloc.start()
    try:
        error_of(await post(make_door, bomb, "gzip", max_body_bytes=2_000_000), 413)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
