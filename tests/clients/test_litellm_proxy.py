"""LiteLLM's proxy before the server, asked by other clients' APIs."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import httpx
import jsonschema
import openai
import pytest

from tests.clients.asked import MODEL, SCHEMA, SORT, SORTED, TOOL, WEATHER

KEY = f"sk-{secrets.token_hex(32)}"
"""Without one the proxy does not start."""
ASKED = [{"role": "user", "content": SORT}]


@pytest.fixture(scope="module")
def proxy(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("proxy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = [
        {
            "model_name": provider,
            "litellm_params": {"model": f"{provider}/{MODEL}", "api_base": base_url, "api_key": "none"},
        }
        for provider in ("openai", "hosted_vllm")
    ]
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model_list": models}))
    command = [str(Path(sys.executable).with_name("litellm")), "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        # By its default it tries three times to fetch a list of prices before it starts.
        env = os.environ | {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline_s = time.monotonic() + 280
        while not is_alive(url):
            is_starting = process.poll() is None and time.monotonic() < deadline_s
            assert is_starting, (folder / "log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        process.kill()
        process.wait()


def is_alive(url: str) -> bool:
    try:
        return bool(urlopen(f"{url}/health/liveliness", timeout=5).status == 200)
    except (URLError, OSError):
        return False


@pytest.fixture(params=["openai", "hosted_vllm"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(proxy: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{proxy}/v1", api_key=KEY, max_retries=0)


def test_chats(client: openai.OpenAI, name: str) -> None:
    whole = client.chat.completions.create(model=name, messages=ASKED, temperature=0)
    assert whole.choices[0].message.content == SORTED
    stream = client.chat.completions.create(model=name, messages=ASKED, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == SORTED


def test_a_forced_call(client: openai.OpenAI, name: str) -> None:
    told = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": WEATHER}],
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = told.choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_responses(client: openai.OpenAI, name: str) -> None:
    assert client.responses.create(model=name, input=SORT, temperature=0).output_text == SORTED


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_messages(proxy: str, name: str, stream: bool) -> None:
    body = {"model": name, "messages": ASKED, "max_tokens": 60, "temperature": 0, "stream": stream}
    told = httpx.post(f"{proxy}/v1/messages", json=body, headers={"x-api-key": KEY}, timeout=60)
    assert told.status_code == 200, told.text
    if stream:
        events = [json.loads(line[6:]) for line in told.text.splitlines() if line.startswith("data: {")]
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(delta.get("text", "") for delta in deltas) == SORTED
    else:
        assert told.json()["content"][-1]["text"] == SORTED


def test_a_prompt_too_long_is_told_and_others_are_served_after_it(client: openai.OpenAI, name: str) -> None:
    for _ in range(4):
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "7, " * 5000}])
    assert client.chat.completions.create(model=name, messages=ASKED, temperature=0).choices
