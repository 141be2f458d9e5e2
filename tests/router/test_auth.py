"""Who is let in: keys hashed at rest, compared in constant time, shown nowhere."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from router.api import create_app
from router.auth import ApiKey, KeyRing, KeysError, digest_of, new_key, parse_keys
from tests.router.conftest import in_process, running
from tests.router.fakes import MODEL, ScriptedReplica
from tests.router.test_api import CHAT, error_of

KEY, ADMIN = new_key(), new_key()
RING = KeyRing((ApiKey("team", digest_of(KEY)), ApiKey("boss", digest_of(ADMIN), admin=True)))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def key_file(**entry: object) -> str:
    return json.dumps({"keys": [{"name": "a", "sha256": digest_of(KEY).hex()} | entry]})


async def test_a_key_is_asked_for_and_only_a_right_one_let_in(make_door):
    replica = ScriptedReplica("a")
    door = await make_door(replica, keys=RING)
    async with running(replica.run()), in_process(create_app(door)) as client:
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 200
        for path in ("/v1/models", "/v1/triad/state", "/openapi.json", "/nowhere"):
            assert error_of(await client.get(path), 401)["code"] == "missing_api_key"
        response = await client.post("/v1/chat/completions", json=CHAT)
        assert error_of(response, 401)["type"] == "invalid_request_error"
        assert response.headers["www-authenticate"] == "Bearer"
        wrong = [KEY[:-1], KEY + "x", "", digest_of(KEY).hex(), "é", "\x00", "none"]
        for headers in [*map(bearer, wrong), {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}]:
            headers = {name: value.encode() for name, value in headers.items()}
            response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
        twice = [("Authorization", f"Bearer {KEY}")] * 2
        error_of(await client.post("/v1/chat/completions", json=CHAT, headers=twice), 401)
        assert replica.submitted == []
        response = await client.post("/v1/chat/completions", json=CHAT, headers=bearer(KEY))
        assert response.status_code == 200


async def test_without_keys_everybody_is_let_in_and_nobody_is_an_admin(make_door):
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        assert (await client.get("/v1/models")).status_code == 200
        response = await client.put("/v1/triad/policy", json={"policy": "ar"})
        assert "new_key" in error_of(response, 403)["message"]


async def test_a_wrong_key_is_refused_before_the_body_is_read(make_door):
    door = await make_door(ScriptedReplica("a"), keys=RING)
    async with in_process(create_app(door)) as client:
        response = await client.post("/v1/chat/completions", content=b"x" * 9 * 2**20)
        error_of(response, 401)


def test_every_key_is_compared_whichever_is_found(monkeypatch):
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr("router.auth.hmac.compare_digest", compare)
    assert RING.find(KEY).name == "team"
    assert RING.find(ADMIN).name == "boss"
    assert RING.find("wrong") is None
    assert len(compared) == 6


def test_only_the_hash_is_kept():
    assert RING.find(KEY).digest == hashlib.sha256(KEY.encode()).digest()
    ring = KeyRing(parse_keys(key_file()))
    shown = repr(ring.find(KEY)) + repr(vars(ring))
    assert KEY not in shown
    assert digest_of(KEY).hex() not in shown
    assert repr(digest_of(KEY)) not in shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "JSON"),
        ("[]", "keys"),
        ('{"keys": []}', "at least 1"),
        pytest.param(key_file(sha256=KEY), "sha256", id="a key for its digest"),
        (key_file(name="a b"), "name"),
        (key_file(requests_per_minute=0), "requests_per_minute"),
        (key_file(amdin=True), "amdin"),
        (json.dumps({"keys": json.loads(key_file())["keys"] * 2}), "same name"),
    ],
)
def test_a_wrong_key_file_is_told_without_its_keys(text, words):
    with pytest.raises(KeysError) as caught:
        parse_keys(text)
    assert words in str(caught.value)
    assert KEY not in str(caught.value)
    assert digest_of(KEY).hex() not in str(caught.value)


def test_the_file_is_read_again_when_it_changes(tmp_path, caplog):
    path = tmp_path / "keys.json"
    path.write_text(key_file(admin=True))
    ring = KeyRing.load(str(path))
    assert ring.find(KEY).admin
    path.write_text("broken")
    with caplog.at_level(logging.ERROR):
        ring.reload_if_changed()
    assert "stay as they were" in caplog.text
    assert ring.find(KEY).admin
    path.write_text(key_file())
    ring.reload_if_changed()
    assert not ring.find(KEY).admin
    path.unlink()
    ring.reload_if_changed()
    assert ring.find(KEY) is not None
    with pytest.raises(KeysError, match=r"api_keys_file .*FileNotFoundError"):
        KeyRing.load(str(path))


def test_keys_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("TRIAD_API_KEYS", key_file(tokens_per_minute=5))
    assert KeyRing.load(None).find(KEY).tokens_per_minute == 5
    monkeypatch.setenv("TRIAD_API_KEYS", "no")
    with pytest.raises(KeysError, match="TRIAD_API_KEYS"):
        KeyRing.load(None)


def test_a_new_key_and_its_entry_belong_together():
    command = [sys.executable, "-m", "cluster.new_key", "team", "--admin", "--tokens-per-minute", "9"]
    root = Path(__file__).parents[2]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=os.environ)
    key = made.stderr.split()[-1]
    found = KeyRing(parse_keys(made.stdout)).find(key)
    assert (found.name, found.admin, found.tokens_per_minute) == ("team", True, 9)
    assert key not in made.stdout
    assert len(key) > 40


async def test_no_key_is_in_the_state_or_the_logs(make_door, caplog):
    door = await make_door(ScriptedReplica("a"), keys=RING)
    with caplog.at_level(logging.DEBUG):
        async with in_process(create_app(door)) as client:
            state = await client.get("/v1/triad/state", headers=bearer(ADMIN))
            error_of(await client.get("/v1/models", headers=bearer(KEY + "x")), 401)
    for secret in (KEY, ADMIN, digest_of(KEY).hex()):
        assert secret not in state.text
        assert secret not in caplog.text
    assert MODEL not in repr(RING)
