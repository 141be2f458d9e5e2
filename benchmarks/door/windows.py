"""Windows of the engine alone and of the whole stack, with the CPU time that each kind of process took."""

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.door.accounting import REPLICA, busiest, cpu_by_kind, pids_by_kind, thread_cpu_s
from benchmarks.modes import held_out_prompts
from benchmarks.replica_alone import ReplicaAlone
from benchmarks.stream_client import Ask, Clients, Opener, Tally, over_http
from policies.modes import Mode
from replicas.messages import DecodingOptions

MODEL = "triad-5m"
MAX_TOKENS = 64
MODES: dict[str, DecodingOptions] = {
    "ar": DecodingOptions(Mode.AR),
    "self_speculation 16": DecodingOptions(Mode.SELF_SPECULATION, 16),
    "diffusion 16": DecodingOptions(Mode.DIFFUSION, 16),
}
ALONE, STACK = "engine alone", "whole stack"
CLIENT = "client"
FORWARD, LOOP = "replica: forwards", "replica: other threads"
ENGINE_PYTHON = "engine outside forwards"
NUM_PROBES = 24
LOAD_POLL_S = 0.02
LONG_PROMPT = "red green blue " * 90


@dataclass(frozen=True, slots=True)
class Row:
    """One window."""

    where: str
    mode: str
    clients: int
    turn: int
    seconds: float
    tokens: int
    chunks: int
    requests: int
    errors: int
    cpu_s: dict[str, float]
    """CPU seconds by kind; of the engine alone only ENGINE_PYTHON, what its thread spent outside forwards."""
    run: dict[str, Any] = field(default_factory=dict)


class Stack:
    """A server under load from this process."""

    def __init__(self, port: int, root: int, model: str = MODEL):
        """root: the id of the process that started it all. model: the name that it is served by."""
        self._port = port
        self._model = model
        self._root = root
        (self._replica,) = pids_by_kind(root)[REPLICA]
        self._forward_threads: frozenset[int] = frozenset()

    def opener(self, mode: str) -> Opener:
        options = MODES[mode]
        decoding: dict[str, Any] = {"mode": options.mode}
        if options.block_length is not None:
            decoding["block_length"] = options.block_length
        return over_http(self._port, self._model, MAX_TOKENS, True, decoding)

    async def find_forward_threads(self) -> None:
        """Finds the threads by long prompts of one token each, whose forwards take nearly all of the time."""
        before = thread_cpu_s(self._replica)
        async with over_http(self._port, self._model, 1, True, {"mode": "ar"})() as ask:
            for number in range(NUM_PROBES):
                await ask(f"{number}: {LONG_PROMPT}", Tally())
        self._forward_threads = busiest(before, thread_cpu_s(self._replica))

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far by kind, this process's among them; FORWARD with ENGINE_PYTHON in it."""
        spent = cpu_by_kind(self._root)
        threads = thread_cpu_s(self._replica)
        forward_s = sum(threads.get(thread, 0.0) for thread in self._forward_threads)
        spent[FORWARD] = forward_s
        spent[LOOP] = sum(threads.values()) - forward_s
        del spent[REPLICA]
        spent[CLIENT] = time.process_time()
        return spent

    async def host_s(self) -> float:
        """CPU seconds so far of the engine's thread outside forwards, by the first load that the replica
        measures from now on."""
        began_s = time.monotonic()
        while True:
            load, age_s = await asyncio.to_thread(_load, self._port)
            if age_s < time.monotonic() - began_s:
                return float(load["host_s"])
            await asyncio.sleep(LOAD_POLL_S)


class Alone:
    """The engine in this process."""

    def __init__(self, replica: ReplicaAlone):
        self._replica = replica

    def opener(self, mode: str) -> Opener:
        @asynccontextmanager
        async def opener() -> AsyncIterator[Ask]:
            async def ask(prompt: str, tally: Tally) -> None:
                await self._replica.ask(prompt, MAX_TOKENS, True, MODES[mode], tally)

            yield ask

        return opener

    def cpu_s(self) -> dict[str, float]:
        return {}

    async def host_s(self) -> float:
        """CPU seconds so far of the engine's thread outside forwards."""
        return self._replica.host_s


async def window(
    target: Stack | Alone, mode: str, num_clients: int, turn: int, settle_s: float, seconds: float
) -> Row:
    """Runs so many clients and counts after settle_s. Raises LoadError where a client's requests all fail."""
    clients = Clients(target.opener(mode), held_out_prompts())
    clients.set_number(num_clients)
    tally = clients.tally
    try:
        await clients.hold(settle_s)
        host_s = await target.host_s()
        cpu_s, began_s = target.cpu_s(), time.monotonic()
        tokens, chunks, requests, errors = _counts(tally)
        await clients.hold(seconds)
        taken_s, now = time.monotonic() - began_s, _counts(tally)
        after_s = target.cpu_s()
        host_s = await target.host_s() - host_s
    finally:
        await clients.leave()
    spent = told_apart({kind: after_s[kind] - cpu_s[kind] for kind in after_s}, host_s)
    where = STACK if isinstance(target, Stack) else ALONE
    counts = (now[0] - tokens, now[1] - chunks, now[2] - requests, now[3] - errors)
    return Row(where, mode, num_clients, turn, round(taken_s, 3), *counts, spent)


def told_apart(cpu_s: Mapping[str, float], host_s: float) -> dict[str, float]:
    """CPU seconds by kind, those of the engine's thread outside forwards taken out of FORWARD's, where the
    threads of forwards were counted whole."""
    found = {**cpu_s, ENGINE_PYTHON: host_s}
    if FORWARD in found:
        found[FORWARD] -= host_s
    return {kind: round(seconds, 3) for kind, seconds in found.items()}


def _load(port: int) -> tuple[dict[str, Any], float]:
    """The load that the one replica published last, and its age in seconds."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/triad/state", timeout=10) as answer:
        (replica,) = json.load(answer)["replicas"]
    return replica["load"], replica["age_s"]


def _counts(tally: Tally) -> tuple[int, int, int, int]:
    return tally.num_tokens, tally.num_chunks, tally.num_requests, tally.num_errors
