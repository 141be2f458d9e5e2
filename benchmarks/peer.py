"""The whole stack against vLLM's CPU build: `python -m benchmarks.peer --checkpoint DIR --vllm PATH`.

Both serve the same checkpoint in bfloat16 over HTTP; 64 output tokens, streamed, ignoring the end of
text. They take turns at each concurrency, the other one idle and vLLM stopped meanwhile; the median
turn counts.

Of each turn also the CPU time that goes beside the forwards, in ms for 1,000 tokens, from /proc:

- Triad's: all processes of the stack, Ray's and Redis among them, without the forwards of the replica; what
  its engine's thread takes outside the runner's `run` the replica itself counts.
- vLLM's: its API server and its engine core, each a process of its own. Its worker, a third process, is
  left out whole. That is in vLLM's favour: the worker also unpacks and packs messages. But while the worker
  computes, the engine core polls a shared memory for its answer (sched_yield), which is waiting and no work;
  `cpu_over_api_server` compares with the API server alone, as if the engine core cost nothing.

So on both sides what takes a scheduled batch and gives its tokens counts as the forward, with laying out
inputs and with sampling.
"""

import argparse
import asyncio
import json
import signal
import statistics
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.door.accounting import thread_cpu_s
from benchmarks.door.windows import CLIENT, FORWARD, MAX_TOKENS, Stack, told_apart
from benchmarks.load import Level, level
from benchmarks.machine import Provenance
from benchmarks.processes import ServerProcess, Triad, command_of, descendants, vllm

LEVELS = (1, 4, 16, 32, 64)
MODEL = "peer"
START_S = 1200.0
"""What vLLM may take to start: its first start compiles the model, minutes on a busy machine."""
API_SERVER, ENGINE_CORE, WORKER = "API server", "engine core", "worker"
FORWARDS = (FORWARD, WORKER)
"""The kinds whose CPU time is the forwards'."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's turn at one concurrency."""

    level: Level
    cpu_ms: dict[str, float]
    """CPU ms for 1,000 tokens, by kind of process; the client's left out."""

    @property
    def beside_ms(self) -> float:
        """CPU ms for 1,000 tokens beside the forwards."""
        return sum(ms for kind, ms in self.cpu_ms.items() if kind not in FORWARDS)


class Peer:
    """vLLM, which runs in its own turns alone."""

    def __init__(self, server: ServerProcess):
        self._server = server

    async def turn(self, concurrency: int, requests_each: int) -> Turn:
        self._server.signal(signal.SIGCONT)
        before = self._cpu_s()
        found = await level(self._server.port, MODEL, concurrency, MAX_TOKENS, requests_each)
        spent = self._cpu_s()
        self._server.signal(signal.SIGSTOP)
        return Turn(found, per_thousand(before, spent, found))

    def _cpu_s(self) -> Counter[str]:
        spent: Counter[str] = Counter()
        for pid in descendants(self._server.process.pid):
            spent[vllm_kind_of(command_of(pid))] += sum(thread_cpu_s(pid).values())  # type: ignore[assignment]
        return spent


class Ours:
    """Triad's whole stack."""

    def __init__(self, server: Triad):
        self._port = server.port
        self._stack = Stack(server.port, server.process.pid, MODEL)

    async def warm_up(self) -> None:
        await level(self._port, MODEL, 4, MAX_TOKENS, 1)
        await self._stack.find_forward_threads()

    async def turn(self, concurrency: int, requests_each: int) -> Turn:
        host_s = await self._stack.host_s()
        before_s = self._stack.cpu_s()
        found = await level(self._port, MODEL, concurrency, MAX_TOKENS, requests_each)
        after_s = self._stack.cpu_s()
        host_s = await self._stack.host_s() - host_s
        spent_s = told_apart({kind: after_s[kind] - before_s[kind] for kind in after_s}, host_s)
        return Turn(found, per_thousand({}, spent_s, found))


def vllm_kind_of(command: str) -> str:
    """The kind of a process of vLLM's by its command line, which it sets itself."""
    if command.startswith("VLLM::EngineCore"):
        return ENGINE_CORE
    return WORKER if command.startswith("VLLM::Worker") else API_SERVER


def per_thousand(before: Mapping[str, float], after: Mapping[str, float], made: Level) -> dict[str, float]:
    """CPU ms for 1,000 tokens by kind, between two readings of CPU seconds; the client's left out."""
    num_tokens = made.num_requests * MAX_TOKENS
    return {
        kind: round(1e6 * (after[kind] - before.get(kind, 0.0)) / num_tokens, 1)
        for kind in after
        if kind != CLIENT
    }


def row_of(concurrency: int, turns: Mapping[str, list[Turn]]) -> dict[str, Any]:
    """The row of a concurrency: of each server the median turn by tokens/s, and that by CPU time."""
    row: dict[str, Any] = {"concurrency": concurrency}
    for name, made in turns.items():
        rates = [turn.level.tokens_per_s for turn in made]
        middle = statistics.median_low(rates)
        row[name] = asdict(made[rates.index(middle)].level) | {"turns": rates}
        beside = [turn.beside_ms for turn in made]
        middle_ms = statistics.median_low(beside)
        row[name]["cpu_ms_per_1000_tokens"] = {
            "beside forwards": round(middle_ms, 1),
            "turns": [round(ms, 1) for ms in beside],
            "by kind": made[beside.index(middle_ms)].cpu_ms,
        }
    if len(turns) > 1:
        ours, theirs = row["triad"], row["vllm"]
        row["ratio"] = round(ours["tokens_per_s"] / theirs["tokens_per_s"], 2)
        ours_ms, theirs_ms = (server["cpu_ms_per_1000_tokens"] for server in (ours, theirs))
        row["cpu_ratio"] = round(ours_ms["beside forwards"] / theirs_ms["beside forwards"], 2)
        row["cpu_over_api_server"] = round(ours_ms["beside forwards"] / theirs_ms["by kind"][API_SERVER], 2)
    return row


async def rows(
    servers: Mapping[str, Ours | Peer], options: argparse.Namespace
) -> AsyncIterator[dict[str, Any]]:
    for concurrency in options.concurrency:
        each = max(options.requests, 4 // concurrency)
        turns: dict[str, list[Turn]] = {name: [] for name in servers}
        for _ in range(options.turns):
            for name, server in servers.items():
                turns[name].append(await server.turn(concurrency, each))
        yield row_of(concurrency, turns)


async def measure(options: argparse.Namespace) -> None:
    given = ("dtype=bfloat16", f"served_model_name={MODEL}", "policy=ar", *options.triad)
    run = asdict(Provenance.now()) | {"triad": options.triad, "vllm_cores": options.vllm_cores}
    results = []
    async with AsyncExitStack() as stack:
        servers: dict[str, Ours | Peer] = {}
        peer = None
        if options.vllm:
            peer = stack.enter_context(
                vllm(options.vllm, options.checkpoint, options.port + 1, MODEL, options.vllm_cores)
            )
            peer.wait_until_ready(START_S)
            await level(peer.port, MODEL, 4, MAX_TOKENS, 1)
            peer.signal(signal.SIGSTOP)
        server = stack.enter_context(Triad(f"model={options.checkpoint}", *given, port=options.port))
        ours = Ours(server)
        await ours.warm_up()
        servers["triad"] = ours
        if peer is not None:
            servers["vllm"] = Peer(peer)
        async for row in rows(servers, options):
            results.append(row | {"run": run})
            print(json.dumps(row), flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a folder of a Llama-family checkpoint")
    parser.add_argument("--vllm", help="the vllm executable; without it Triad alone is measured")
    parser.add_argument(
        "--vllm-cores",
        default="auto",
        help="of its forwards' threads, as in 0-1; by itself vLLM leaves one to its other processes",
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="of each client, one after the other")
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(LEVELS))
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--triad", nargs="*", default=[], help="further key=value of its configuration")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # As by Ctrl-C, so that the servers are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
