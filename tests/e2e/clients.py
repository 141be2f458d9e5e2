"""Clients of a running server, over real HTTP."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "triad-5m"
PATH = "/v1/chat/completions"


def chat(content: str, **more: Any) -> dict[str, Any]:
    """A greedy request of 48 tokens, whatever the model makes of its end."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 48,
        "ignore_eos": True,
    }
    return body | more


@dataclass
class Streamed:
    """What one stream brought. last: the chunk with the finish reason."""

    text: str = ""
    num_chunks: int = 0
    last: dict[str, Any] | None = None
    usage: dict[str, int] | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    began_s: float = field(default_factory=time.monotonic)

    @property
    def modes(self) -> set[str]:
        assert self.last is not None
        return set(self.last["decoding"]["tokens"])

    def take(self, line: str) -> None:
        if line in ("", "event: error"):
            return
        assert not self.done
        assert line.startswith("data: ")
        if line == "data: [DONE]":
            self.done = True
            return
        chunk = json.loads(line[6:])
        if "error" in chunk:
            self.error = chunk["error"]
            return
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            assert self.last is None, "a choice after the last one"
            self.text += choice["delta"].get("content", "")
            self.num_chunks += 1
            if choice["finish_reason"] is not None:
                self.last = chunk


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Streamed:
    """Streams to the end. Raises httpx.HTTPStatusError for an answer that is not 200."""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    streamed = Streamed()
    async with client.stream("POST", PATH, json=body) as response:
        if response.is_error:
            await response.aread()
        response.raise_for_status()
        async for line in response.aiter_lines():
            streamed.take(line)
    return streamed


async def complete(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def state_of(client: httpx.AsyncClient) -> dict[str, Any]:
    """The cluster's state. Asked without blocking: this process plays many clients at once."""
    response = await client.get("/v1/triad/state")
    assert response.status_code == 200, response.text
    state: dict[str, Any] = response.json()
    return state


async def all_fresh(client: httpx.AsyncClient, num_replicas: int = 2) -> dict[str, Any] | None:
    """The state once every replica has said how it is, and has a plan."""
    state = await state_of(client)
    fresh = [r for r in state["replicas"] if r["freshness"] == "fresh" and r["plan"] is not None]
    return state if len(fresh) == num_replicas and state["leader"] is not None else None


async def total(client: httpx.AsyncClient, name: str) -> int:
    """The sum of one field of the replicas' loads."""
    return sum(r["load"][name] for r in (await state_of(client))["replicas"])


def text_of(answer: dict[str, Any]) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content
