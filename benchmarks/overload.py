"""Goodput under 10 times the load, against the peak: `python -m benchmarks.overload [--json PATH]`.

A real server with one replica, the whole stack. The two take turns, a window each: at the peak a
closed loop of as many clients as the replica runs at once; under overload requests arrive at random
(Poisson), `--times` as many a second as the peak served, whatever becomes of them. Goodput is
tokens a second of answers that came whole. Server and clients share this machine: refusals cost the
door CPU time, which a replica on CPUs lacks. `--pin` gives the replica a core of its own, as it would
have a GPU, and leaves the others to the rest.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import PROMPTS
from benchmarks.processes import Triad

RESULTS = Path(__file__).parent / "results" / "overload-cpu.json"
MODEL = "triad-5m"
MAX_RUNNING = 16
MAX_WAITING = 16
TIMEOUT_S = 120.0


@dataclass
class Window:
    """The tallies of one window."""

    seconds: float
    num_tokens: int = 0
    """Tokens of answers that came whole within the window."""
    answers: Counter[str] = field(default_factory=Counter)
    """Answers by status; refusals without a Retry-After are counted apart."""
    refusal_ms: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


async def ask(port: int, max_tokens: int, number: int) -> tuple[str, int]:
    """The kind of one answer, and its number of tokens, of a whole answer only."""
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    body = json.dumps(request).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        received = await reader.read()
    finally:
        writer.close()
    status = received.split(b" ", 2)[1].decode()
    if status != "200":
        has_word = b"\r\nretry-after:" in received.partition(b"\r\n\r\n")[0].lower()
        return status if has_word else f"{status} without Retry-After", 0
    return ("200", max_tokens) if b"data: [DONE]" in received else ("200 broken off", 0)


async def take(window: Window, port: int, max_tokens: int, number: int, ends_s: float) -> None:
    """Asks, and counts the answer; one that ends after ends_s adds no tokens to the goodput."""
    began_s = time.monotonic()
    async with asyncio.timeout(TIMEOUT_S):
        kind, num_tokens = await ask(port, max_tokens, number)
    window.answers[kind] += 1
    now_s = time.monotonic()
    if now_s <= ends_s:
        window.num_tokens += num_tokens
    if kind in ("429", "503"):
        window.refusal_ms.append((now_s - began_s) * 1e3)


async def peak(port: int, options: argparse.Namespace) -> Window:
    window = Window(options.seconds)
    ends_s = time.monotonic() + options.seconds

    async def client(number: int) -> None:
        while time.monotonic() < ends_s:
            await take(window, port, options.max_tokens, number, ends_s)
            number += 1

    await asyncio.gather(*(client(number) for number in range(MAX_RUNNING)))
    return window


async def overload(port: int, rate: float, rng: random.Random, options: argparse.Namespace) -> Window:
    window = Window(options.seconds)
    next_s = time.monotonic()
    ends_s = next_s + options.seconds
    async with asyncio.TaskGroup() as group:
        number = 0
        while next_s < ends_s:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            group.create_task(take(window, port, options.max_tokens, number, ends_s))
            number += 1
            next_s += rng.expovariate(rate)
    return window


def described(window: Window) -> dict[str, Any]:
    refusal_ms = round(statistics.median(window.refusal_ms), 1) if window.refusal_ms else None
    return {
        "tokens_per_s": round(window.tokens_per_s, 1),
        "answers": dict(sorted(window.answers.items())),
        "refusal_p50_ms": refusal_ms,
        "cpu_s": window.cpu_s,
    }


def pin(server: Triad) -> None:
    """Pins every thread of the server; those to come follow their process."""
    first, *others = sorted(os.sched_getaffinity(0))
    replicas = server.pids("triad:Replica")
    for pid in (*server.pids(""), os.getpid()):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), {first} if pid in replicas else set(others))


@contextmanager
def cpu_of(server: Triad) -> Iterator[dict[str, float]]:
    """Fills in the CPU seconds of what happens meanwhile, by process, this one included."""
    spent: dict[str, float] = {}
    before, own_before_s = server.cpu_s(), time.process_time()
    yield spent
    for name, seconds in (server.cpu_s() - before).most_common(5):
        spent[name] = round(seconds, 1)
    spent["clients"] = round(time.process_time() - own_before_s, 1)


async def measure(server: Triad, options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(1)
    port = server.port
    await peak(port, options)  # warms up
    turns = []
    for _ in range(options.turns):
        with cpu_of(server) as cpu_s:
            best = await peak(port, options)
        best.cpu_s = cpu_s
        rate = options.times * best.answers["200"] / options.seconds
        with cpu_of(server) as cpu_s:
            much = await overload(port, rate, rng, options)
        much.cpu_s = cpu_s
        turn = {
            "peak": described(best),
            "arrivals_per_s": round(rate, 1),
            "overload": described(much),
            "ratio": round(much.tokens_per_s / best.tokens_per_s, 3),
        }
        print(json.dumps(turn), flush=True)
        turns.append(turn)
    ratio = round(statistics.median(turn["ratio"] for turn in turns), 3)
    return {
        "hardware": f"CPU, {os.cpu_count()} cores for server and clients"
        + ", one the replica's" * options.pin,
        "max_tokens": options.max_tokens,
        "turns": turns,
        "ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a window")
    parser.add_argument("--pin", action="store_true", help="the replica to one core, all else to the others")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--triad", nargs="*", default=[], help="further key=value of its configuration")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    places = (f"max_running={MAX_RUNNING}", f"max_waiting={MAX_WAITING}", "num_threads=1", "policy=ar")
    with Triad(*places, *options.triad) as server:
        if options.pin:
            pin(server)
        found = asyncio.run(measure(server, options))
    print(f"goodput under {options.times:g} times the load: {found['ratio']:.0%} of the peak")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
