"""A closed loop of streaming chat completions over loopback, by a client that costs next to nothing."""

import asyncio
import json
import statistics
import time
from dataclasses import dataclass

PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a fox.",
    "Explain how rain forms.",
    "List five fruits and their colours.",
    "Write a Python function that adds two numbers.",
    "Who was Isaac Newton?",
    "Give me three tips for better sleep.",
    "Summarise the story of Cinderella.",
    "What is photosynthesis?",
    "Describe a sunny day at the beach.",
    "How do I boil an egg?",
    "Write a polite email asking for a day off.",
)
TIMEOUT_S = 300.0


class LoadError(Exception):
    """A request was not answered as it should be."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer."""

    ttft_s: float
    """The time from sending to the first event with content."""
    total_s: float
    num_tokens: int
    """The tokens that the server's usage says."""


@dataclass(frozen=True, slots=True)
class Level:
    """The figures of a server at one concurrency."""

    concurrency: int
    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    """The median of (end - first token) / (tokens - 1)."""
    num_requests: int


async def complete(port: int, model: str, prompt: str, max_tokens: int, extra: dict[str, object]) -> Answered:
    """Asks for one completion.

    extra: further fields of the request

    Raises LoadError when the stream does not end with [DONE], or, unless `ignore_eos` is false in `extra`,
    gives another number of tokens.
    """
    request = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **extra,
    }
    body = json.dumps(request).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    began_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        received = bytearray()
        first_s = None
        while data := await reader.read(1 << 16):
            received += data
            if first_s is None and _has_content(received):
                first_s = time.perf_counter()
        ended_s = time.perf_counter()
    finally:
        writer.close()
    if first_s is None or b"data: [DONE]" not in received:
        raise LoadError(f"not a whole stream: {bytes(received[-500:])!r}")
    usage = received.rindex(b'"completion_tokens"')
    num_tokens = int(received[usage:].partition(b":")[2].partition(b",")[0].strip(b" }"))
    if request["ignore_eos"] and num_tokens != max_tokens:
        raise LoadError(f"{num_tokens} tokens instead of {max_tokens}")
    return Answered(first_s - began_s, ended_s - began_s, num_tokens)


def _has_content(received: bytearray) -> bool:
    """True if an event with a token's text is there; the first, which names the role, has none."""
    return any(
        b'"content":"' in part and b'"content":""' not in part
        for part in received.replace(b'": "', b'":"').split(b"data: ")[1:]
    )


def prompts_of(client: int, requests_each: int) -> list[str]:
    """The prompts of one of several clients, one after the other."""
    return [PROMPTS[(client * requests_each + turn) % len(PROMPTS)] for turn in range(requests_each)]


async def level(
    port: int,
    model: str,
    concurrency: int,
    max_tokens: int = 64,
    requests_each: int = 3,
    extra: dict[str, object] | None = None,
) -> Level:
    """Runs `concurrency` clients, each with so many requests one after the other."""
    answers: list[Answered] = []

    async def client(number: int) -> None:
        for prompt in prompts_of(number, requests_each):
            async with asyncio.timeout(TIMEOUT_S):
                answers.append(await complete(port, model, prompt, max_tokens, extra or {}))

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(concurrency):
            group.create_task(client(number))
    taken_s = time.perf_counter() - began_s
    return Level(
        concurrency,
        round(sum(answer.num_tokens for answer in answers) / taken_s, 1),
        round(statistics.median(answer.ttft_s for answer in answers) * 1e3, 1),
        round(statistics.median((a.total_s - a.ttft_s) / (a.num_tokens - 1) for a in answers) * 1e3, 2),
        len(answers),
    )
