"""A server under mixed load and random faults, and whether all is as before: `make soak ARGS="--minutes 30"`.

A real server with two replicas and an embedded Redis, on the embedded checkpoint. Clients send every
kind of request there is (benchmarks/soak_load.py); meanwhile Redis is killed and paused, a replica's
process killed, the policy switched, and bursts come, in an order that the seed fixes. No request may
end without its terminal event, nor with an error that no fault explains. Before and after, with no
load, memory, file handles, threads, asyncio tasks and pages are read; they must be back where they
were after the warm-up. Exit status 1 if anything is amiss.

The younger replica is the one that is killed, so the other's figures are those of the whole run.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import ServerProcess, Triad
from benchmarks.soak_figures import KV_CACHE_MIB, NUM_BURST, Row, allowed, report
from benchmarks.soak_load import MODEL, Clients, Plan, Tally, draw
from router.auth import ENVIRONMENT, digest_of, new_key

RESULTS = Path(__file__).parent / "results" / "soak-cpu.json"
LEVELS = [
    {"max_in_flight": 1, "mode": "diffusion", "block_length": 16},
    {"max_in_flight": 2, "mode": "self_speculation", "block_length": 8},
]
THRESHOLD = {"policy": "threshold", "policy_params": {"levels": LEVELS, "stabilise": {"dwell_s": 0.5}}}
POLICIES = (
    {"policy": "ar"},
    {"policy": "diffusion"},
    {"policy": "self_speculation"},
    {"policy": "cost_model"},
    THRESHOLD,
    THRESHOLD,
)
REPLICA, INGRESS, VALKEY = "triad:Replica", "triad:Ingress", "valkey-server"
WATCHED = (
    REPLICA,
    INGRESS,
    "triad:Redis",
    VALKEY,
    "ProxyActor",
    "HAProxyManager",
    "bin/haproxy",
    "ServeController",
)
ARGUMENTS = (
    "num_replicas=2",
    "num_threads=1",
    "max_running=8",
    "max_waiting=16",
    f"kv_cache_mb={KV_CACHE_MIB}",
    "policy=threshold",
)
"""The server's configuration: small, so that a burst is shed and pages run short."""
SETTLE_WITHIN_S = 240.0


@dataclass
class Faults:
    counts: Counter[str] = field(default_factory=Counter)
    killed_s: list[float] = field(default_factory=list)
    """The times at which a replica was killed; time.monotonic()."""

    def excuse(self, began_s: float) -> bool:
        return bool(self.killed_s) and self.killed_s[-1] >= began_s


class Governor:
    """Lets requests begin while the server and this process have used less than their share of a core."""

    def __init__(self, server: ServerProcess, cores: float):
        self._server = server
        self._cores = cores
        self._go = asyncio.Event()
        self._go.set()
        self.used_s = 0.0

    async def turn(self) -> None:
        await self._go.wait()

    async def run(self) -> None:
        balance_s = 5.0
        at_s, used_s = time.monotonic(), self._cpu_s()
        while True:
            await asyncio.sleep(0.5)
            now_s, now_used_s = time.monotonic(), self._cpu_s()
            spent_s = max(0.0, now_used_s - used_s)  # a process that has ended takes its count along
            self.used_s += spent_s
            balance_s = min(5.0, max(-10.0, balance_s + self._cores * (now_s - at_s) - spent_s))
            at_s, used_s = now_s, now_used_s
            self._go.set() if balance_s > 0 else self._go.clear()

    def _cpu_s(self) -> float:
        return sum(self._server.cpu_s().values()) + time.process_time()


class Soak:
    def __init__(
        self,
        server: ServerProcess,
        http: httpx.AsyncClient,
        admin: dict[str, str],
        options: argparse.Namespace,
    ):
        self._server = server
        self._http = http
        self._admin = admin
        self._options = options
        self._rng = random.Random(options.seed)
        self.tally = Tally()
        self.faults = Faults()
        self._clients = Clients(http, self.tally, self.faults.excuse)
        self.governor = Governor(server, options.cores)
        self.series: list[dict[str, Any]] = []

    async def run(self, minutes: float) -> list[Row]:
        warm_s = min(240.0, max(5.0, minutes * 60 * 0.2))
        governing = asyncio.create_task(self.governor.run())
        try:
            await self._settle()
            await self._load(warm_s, with_faults=False)
            # A replica's heap grows to what its fullest steps take, and stays there.
            await self._ask_at_once(random.Random(self._options.seed + 2))
            before = await self._settle()
            await self._load(minutes * 60, with_faults=True)
            await self._set_policy(None)
            after = await self._settle()
        finally:
            governing.cancel()
        return [
            Row(what, number, after.get(what, 0.0), allowed(what, number)) for what, number in before.items()
        ]

    async def _load(self, for_s: float, with_faults: bool) -> None:
        """Lets requests begin for for_s seconds, with faults or not; returns when all have ended."""
        stop = asyncio.Event()
        seeds = [self._rng.randrange(2**32) for _ in range(self._options.clients)]
        async with asyncio.TaskGroup() as group:
            for seed in seeds:
                group.create_task(self._client(random.Random(seed), stop))
            watching = group.create_task(self._watch())
            if with_faults:
                group.create_task(self._fault(random.Random(self._options.seed + 1), stop, for_s))
            await asyncio.sleep(for_s)
            stop.set()
            watching.cancel()

    async def _client(self, rng: random.Random, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.governor.turn()
            await self._clients.ask(draw(rng))

    async def _watch(self) -> None:
        while True:
            self.series.append({"at_s": round(time.monotonic(), 1), **self._processes()})
            await asyncio.sleep(60)

    async def _fault(self, rng: random.Random, stop: asyncio.Event, for_s: float) -> None:
        every_s = min(20.0, for_s / 12)
        kinds: list[Callable[[random.Random], Awaitable[None]]] = [
            self._burst,
            self._switch_policy,
            self._kill_redis,
            self._switch_policy,
            self._pause_redis,
            self._kill_replica,
        ]
        while True:
            rng.shuffle(kinds)
            for kind in kinds:
                try:
                    async with asyncio.timeout(rng.uniform(0.5, 1.5) * every_s):
                        await stop.wait()
                    return
                except TimeoutError:
                    await kind(rng)

    async def _burst(self, rng: random.Random) -> None:
        self.faults.counts["burst"] += 1
        await self._ask_at_once(rng)

    async def _ask_at_once(self, rng: random.Random) -> None:
        plan = Plan(draw(rng).body | {"stream": True, "max_tokens": 32, "temperature": 0})
        plan.body.pop("timeout_s", None)
        await asyncio.gather(*(self._clients.ask(plan) for _ in range(NUM_BURST)))

    async def _switch_policy(self, rng: random.Random) -> None:
        self.faults.counts["policy switched"] += 1
        await self._set_policy(rng.choice(POLICIES))

    async def _kill_redis(self, rng: random.Random) -> None:
        for pid in self._server.pids(VALKEY):
            self.faults.counts["Redis killed"] += 1
            os.kill(pid, signal.SIGKILL)

    async def _pause_redis(self, rng: random.Random) -> None:
        for pid in self._server.pids(VALKEY):
            self.faults.counts["Redis paused"] += 1
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(rng.uniform(0.5, 4.0))
            finally:
                os.kill(pid, signal.SIGCONT)

    async def _kill_replica(self, rng: random.Random) -> None:
        pids = self._server.pids(REPLICA)
        if len(pids) < 2 or not await self._all_fresh():
            return  # the last one killed is not back yet
        self.faults.counts["replica killed"] += 1
        os.kill(pids[-1], signal.SIGKILL)
        self.faults.killed_s.append(time.monotonic())

    async def _set_policy(self, choice: dict[str, Any] | None) -> None:
        """Sets the policy. A Redis that is away is waited for."""
        deadline_s = time.monotonic() + 30.0
        while True:
            method = "DELETE" if choice is None else "PUT"
            response = await self._http.request(method, "/v1/triad/policy", json=choice, headers=self._admin)
            if response.status_code == 200:
                return
            if response.status_code != 503 or time.monotonic() > deadline_s:
                self.tally.wrong(f"policy {choice}: {response.status_code} {response.text}")
                return
            await asyncio.sleep(0.5)

    async def _settle(self) -> dict[str, float]:
        """Waits until both replicas are there and idle, and reads all figures, each at its least."""
        deadline_s = time.monotonic() + SETTLE_WITHIN_S
        while not await self._all_fresh(idle=True):
            if time.monotonic() > deadline_s:
                state = (await self._http.get("/v1/triad/state")).text
                self.tally.wrong(f"not idle within {SETTLE_WITHIN_S:g} s: {state[:2000]}")
                break
            await asyncio.sleep(0.5)
        least: dict[str, float] = {}
        for _ in range(6):
            await asyncio.sleep(0.3)
            for what, number in (await self._figures()).items():
                least[what] = min(number, least.get(what, number))
        return least

    async def _all_fresh(self, idle: bool = False) -> bool:
        state = (await self._http.get("/v1/triad/state")).json()
        loads = [r["load"] for r in state["replicas"] if r["freshness"] == "fresh"]
        known = set(state["router"]["in_flight"]) == {load["replica_id"] for load in loads}
        if len(loads) < 2 or not known or state["leader"] is None:
            return False
        busy = sum(load["num_running"] + load["num_waiting"] + load["pages_used"] for load in loads)
        return not idle or busy + sum(state["router"]["in_flight"].values()) == 0

    async def _figures(self) -> dict[str, float]:
        state = (await self._http.get("/v1/triad/state")).json()
        loads = [r["load"] for r in state["replicas"] if r["freshness"] == "fresh"]
        return {
            **self._processes(),
            "tasks: Ingress": state["router"]["num_tasks"],
            "tasks: a replica's, at most": max((load["num_tasks"] for load in loads), default=0),
            "pages used": sum(load["pages_used"] for load in loads),
            "requests in flight": sum(state["router"]["in_flight"].values()),
            "requests in replicas": sum(load["num_running"] + load["num_waiting"] for load in loads),
        }

    def _processes(self) -> dict[str, float]:
        """Each watched process's anonymous memory in MiB, open files, threads. The oldest is number 1."""
        found: dict[str, float] = {}
        for kind in WATCHED:
            for number, pid in enumerate(self._server.pids(kind), 1):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    files = len(os.listdir(f"/proc/{pid}/fd"))
                except OSError:
                    continue
                fields = dict(line.split(":", 1) for line in status.splitlines())
                name = f"{kind.rpartition(':')[2]} {number}"
                found[f"MiB: {name}"] = round(int(fields["RssAnon"].split()[0]) / 1024, 1)
                found[f"files: {name}"] = files
                found[f"threads: {name}"] = int(fields["Threads"])
        return found


async def soak(server: ServerProcess, keys: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    bearer = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    began_s = time.monotonic()
    async with httpx.AsyncClient(
        base_url=server.url, headers=bearer["load"], limits=limits, timeout=120.0
    ) as http:
        run = Soak(server, http, bearer["ops"], options)
        rows = await run.run(options.minutes)
    took_s = time.monotonic() - began_s
    return {
        "hardware": f"CPU, {os.cpu_count()} cores, kept to {options.cores:g} of one",
        "model": MODEL,
        "minutes": options.minutes,
        "seed": options.seed,
        "cores_used": round(run.governor.used_s / took_s, 2),
        "requests": dict(sorted(run.tally.ends.items())),
        "faults": dict(sorted(run.faults.counts.items())),
        "num_broken": run.tally.num_broken,
        "broken": run.tally.broken,
        "fine": run.tally.num_broken == 0 and all(row.is_fine for row in rows),
        "rows": [asdict(row) | {"fine": row.is_fine} for row in rows],
        "series": run.series,
    }


def new_keys() -> tuple[str, dict[str, str]]:
    """The server's text of two API keys, and the keys: one with limits, so that every request asks Redis, and
    one that may switch the policy."""
    keys = {"load": new_key(), "ops": new_key()}
    entries: list[dict[str, Any]] = [
        {"name": name, "sha256": digest_of(key).hex()} for name, key in keys.items()
    ]
    entries[0] |= {"requests_per_minute": 100_000, "tokens_per_minute": 100_000_000}
    entries[1] |= {"admin": True}
    return json.dumps({"keys": entries}), keys


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="with faults; the warm-up is a fifth more"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--cores", type=float, default=2.0, help="CPU time to use, in cores; load waits for it"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    # As by Ctrl-C, so that the server is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    entries, keys = new_keys()
    params = json.dumps(THRESHOLD["policy_params"])
    with Triad(*ARGUMENTS, f"policy_params={params}", env={ENVIRONMENT: entries}) as server:
        found = asyncio.run(soak(server, keys, options))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    report(found)
    sys.exit(not found["fine"])


if __name__ == "__main__":
    main()
