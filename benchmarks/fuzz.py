"""Bad and extreme requests by the thousand, and whether anyone else notices: `python -m benchmarks.fuzz`.

A Triad of its own on the embedded checkpoint or on --checkpoint, or one that runs at --url. While streams and
answers that must be what they are alone go on, others send what benchmarks/fuzz_cases.py has. Wrong is a 5xx
that the docs don't name, an error that is not of OpenAI's form, a request without an end, a bystander's
answer that is another, and a server that is not idle or has grown when all is over. Exit status 1 then.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from benchmarks.fuzz_cases import CHAT, Case, at_bounds, chat, kinds, mutations, of_document
from benchmarks.processes import ServerProcess, Triad

END_WITHIN_S = 60.0
"""The time after which a request that has not ended hangs."""
NUM_AT_ONCE = 6
IDLE_WITHIN_S = 60.0
MAY_GROW = 0.05
MAY_GROW_MB = 48.0
"""MiB that a process may grow beside the share MAY_GROW, from the first half's end to the second's."""
PROCESSES = ("triad:Replica", "triad:Ingress")
NAMED = {(504, "deadline_exceeded")}
"""Errors of 5xx that a request may bring upon itself, by the docs: its own timeout_s."""
BYSTANDERS: dict[str, dict[str, Any]] = {
    "stream of ar": {"stream": True, "decoding": {"mode": "ar"}},
    "lossless stream, sampled": {
        "stream": True,
        "decoding": {"lossless": True},
        "temperature": 0.8,
        "seed": 5,
    },
    "JSON": {"response_format": {"type": "json_object"}, "max_tokens": 60, "ignore_eos": False},
    "choices": {"n": 2, "seed": 1, "temperature": 0.5, "stop": ["\n\n"], "logprobs": True, "max_tokens": 60},
}


@dataclass
class Found:
    """The findings of a run."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Answers of all cases, by status."""
    problems: list[str] = field(default_factory=list)
    bystanders: Counter[str] = field(default_factory=Counter)
    longest_gap_s: float = 0.0
    """The longest gap in a bystander's stream."""
    slowest: list[tuple[float, str]] = field(default_factory=list)
    memory_mb: list[dict[str, float]] = field(default_factory=list)
    """Memory after each half, by process."""

    def wrong(self, what: str) -> None:
        if len(self.problems) < 200:
            self.problems.append(what)


LAST_EVENTS = {"message_stop", "error", "response.completed", "response.incomplete", "response.failed"}
"""The names of what ends a stream of Messages or Responses."""


def verdict(case: Case, status: int, kind: str, body: bytes) -> str | None:
    """The fault of an answer; None if there is none."""
    if status == 200 and not kind.startswith("text/event-stream"):
        return None
    if case.method == "HEAD":
        return f"status {status}" if status >= 500 else None
    try:
        if kind.startswith("text/event-stream"):
            *events, end = body.decode().split("\n\n")
            if not end and events[0].startswith(("event: message_start", "event: response.")):
                name = events[-1].partition("\n")[0].removeprefix("event: ")
                return None if name in LAST_EVENTS else f"a stream that ends with {name}"
            last = events[-1].removeprefix("event: error\n").removeprefix("data: ")
            if end or not all(event.startswith("data: ") for event in events[:-1]):
                return f"no stream of events: {body[-200:]!r}"
            error = None if last == "[DONE]" else json.loads(last)["error"]
            status = status if error is None else {"deadline_exceeded": 504}.get(error["code"], 500)
        elif kind.startswith("text/html") and status in (400, 408):
            return None  # from HAProxy: what it can't read as a request (docs/operate.md)
        else:
            answer = json.loads(body)
            error = answer["error"]
            if answer.get("type") == "error":  # Anthropic's form, which has no more
                code = next((code for named, code in NAMED if named == status), None)
                error = {"param": None, "code": code} | error
        if error is None:
            return None
        if set(error) != {"message", "type", "param", "code"} or not error["message"]:
            return f"an error of another form: {error}"
    except (ValueError, KeyError, TypeError, IndexError) as fault:
        return f"{status} not of the API's form: {fault!r} in {body[-200:]!r}"
    if status >= 500 and (status, error["code"]) not in NAMED:
        return f"{status} {error}"
    return None


class Barrage:
    """One server, its bystanders, and what is sent at it."""

    def __init__(self, http: httpx.AsyncClient, model: str, found: Found):
        self._http = http
        self._model = model
        self._alone: dict[str, list[str]] = {}
        self.found = found

    async def begin(self) -> None:
        """Notes the answers that each bystander gets when there is nobody else."""
        for name in BYSTANDERS:
            self._alone[name] = await self._answers(name)

    async def _answers(self, name: str) -> list[str]:
        """The texts of a bystander's choices. Raises httpx.HTTPError; ValueError for what is no answer."""
        body = chat(
            self._model, "Write a short story about Anna.", max_tokens=300, temperature=0, ignore_eos=True
        )
        body |= BYSTANDERS[name]
        if not body.get("stream"):
            response = await self._http.post(CHAT, json=body)
            if response.status_code != 200:
                raise ValueError(f"{response.status_code} {response.text[:300]}")
            return [choice["message"]["content"] for choice in response.json()["choices"]]
        told, last = "", ""
        at_s = time.monotonic()
        async with self._http.stream("POST", CHAT, json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code} {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                now_s = time.monotonic()
                self.found.longest_gap_s = max(self.found.longest_gap_s, now_s - at_s)
                at_s = now_s
                last = line.removeprefix("data: ") or last
                if line.startswith("data: {"):
                    chunk = json.loads(last)
                    if "error" in chunk:
                        raise ValueError(f"an error in mid-stream: {chunk['error']}")
                    told += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
        if last != "[DONE]":
            raise ValueError(f"a stream that ends with {last[:200]!r}")
        return [told]

    async def _bystander(self, name: str, is_over: asyncio.Event) -> None:
        """Asks for one answer after the other until all is over, and once more."""
        while True:
            was_over = is_over.is_set()
            try:
                async with asyncio.timeout(END_WITHIN_S):
                    told = await self._answers(name)
                if told != self._alone[name]:
                    self.found.wrong(f"bystander {name}: {told} where alone it is {self._alone[name]}")
                self.found.bystanders[name] += 1
            except (TimeoutError, httpx.HTTPError, ValueError) as error:
                self.found.wrong(f"bystander {name}: {type(error).__name__} {error}")
                await asyncio.sleep(0.2)
            if was_over:
                return

    async def _ask(self, case: Case) -> None:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(END_WITHIN_S):
                sending = self._http.request(
                    case.method, case.path, content=case.content, headers=case.headers
                )
                if case.leave_after_s is None:
                    response = await sending
                else:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(case.leave_after_s):
                            await sending
                    self.found.statuses["left"] += 1
                    return
        except TimeoutError:
            self.found.wrong(f"{case.name}: no end within {END_WITHIN_S:g} s: {case.content[:300]!r}")
            return
        except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeEncodeError):
            self.found.statuses["no client can send it"] += 1
            return
        except httpx.HTTPError as error:
            self.found.wrong(f"{case.name}: {type(error).__name__} {error}: {case.content[:300]!r}")
            return
        self.found.statuses[str(response.status_code)] += 1
        kind = response.headers.get("content-type", "")
        wrong = verdict(case, response.status_code, kind, response.content)
        if wrong is not None:
            self.found.wrong(f"{case.name}: {wrong}: {case.content[:300]!r}")
        self.found.slowest = sorted([*self.found.slowest, (time.monotonic() - began_s, case.name)])[-5:]

    async def send(self, cases: Iterable[Case]) -> None:
        """Sends the cases, NUM_AT_ONCE at a time, beside the bystanders; returns when all have ended."""
        waiting = iter(cases)

        async def sender() -> None:
            for case in waiting:
                await self._ask(case)

        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for name in BYSTANDERS:
                group.create_task(self._bystander(name, is_over))
            async with asyncio.TaskGroup() as senders:
                for _ in range(NUM_AT_ONCE):
                    senders.create_task(sender())
            is_over.set()

    async def settle(self, pages_used: int) -> None:
        """Waits until nothing runs and pages are as they were."""
        deadline_s = time.monotonic() + IDLE_WITHIN_S
        while True:
            state = await self.state()
            loads = [replica["load"] for replica in state["replicas"]]
            busy = sum(load["num_running"] + load["num_waiting"] for load in loads)
            busy += sum(state["router"]["in_flight"].values())
            pages = sum(load["pages_used"] for load in loads)
            if busy == 0 and pages <= pages_used and loads:
                return
            if time.monotonic() > deadline_s:
                self.found.wrong(f"not idle: {busy} requests, {pages} pages where {pages_used} were")
                return
            await asyncio.sleep(0.2)

    async def state(self) -> dict[str, Any]:
        state: dict[str, Any] = (await self._http.get("/v1/triad/state")).json()
        return state


def memory_mb(server: ServerProcess) -> dict[str, float]:
    """Anonymous memory of the server's own processes."""
    found: dict[str, float] = {}
    for name in PROCESSES:
        for number, pid in enumerate(server.pids(name)):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            kb = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            found[f"{name} {number}"] = kb / 1024
    return found


async def barrage(
    url: str, server: ServerProcess | None, num_cases: int, seed: int = 0, model: str | None = None
) -> Found:
    """Sends all cases at a server beside its bystanders.

    num_cases: in two halves, after each of which memory is read
    server: the one at url, if it is ours
    """
    found = Found()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(END_WITHIN_S), limits=limits) as http:
        document = (await http.get("/openapi.json")).json()
        model = model or (await http.get("/v1/models")).json()["data"][0]["id"]
        run = Barrage(http, model, found)
        await run.begin()
        await run.settle(sys.maxsize)
        pages_used = sum(r["load"]["pages_used"] for r in (await run.state())["replicas"])
        pids = [] if server is None else [server.pids(name) for name in PROCESSES]
        cases = await asyncio.to_thread(cases_of, model, document, num_cases, seed)
        for half in (cases[::2], cases[1::2]):
            await run.send(half)
            await run.settle(pages_used)
            if server is not None:
                found.memory_mb.append(memory_mb(server))
        if server is not None and [server.pids(name) for name in PROCESSES] != pids:
            found.wrong(f"processes have died: {PROCESSES} were {pids}")
    grown(found)
    return found


def cases_of(model: str, document: dict[str, Any], num_cases: int, seed: int) -> list[Case]:
    """All kinds of cases there are, then a third each boundary values, cases of the document and
    mutations."""
    rng = random.Random(seed)
    cases = kinds(model)
    each = max(0, num_cases - len(cases)) // 3
    cases += rng.sample(of_fields := at_bounds(model, document), min(len(of_fields), each))
    cases += of_document(model, document, seed, each)
    cases += islice(mutations(model, document, seed), max(0, num_cases - len(cases)))
    rng.shuffle(cases)
    return cases


def grown(found: Found) -> None:
    if len(found.memory_mb) < 2:
        return
    first, last = found.memory_mb[0], found.memory_mb[-1]
    for name in first.keys() & last.keys():
        if last[name] > first[name] * (1 + MAY_GROW) + MAY_GROW_MB:
            found.wrong(f"{name} has grown from {first[name]:.0f} to {last[name]:.0f} MB")


def fuzz(o: argparse.Namespace) -> Found:
    if o.url is not None:
        return asyncio.run(barrage(o.url, None, o.cases, o.seed))
    with Triad(*([] if o.checkpoint is None else [f"model={o.checkpoint.absolute()}"])) as server:
        return asyncio.run(barrage(server.url, server, o.cases, o.seed))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a Triad that runs; without it one is started")
    parser.add_argument("--checkpoint", type=Path, help="of the own server")
    parser.add_argument("--out", type=Path, help="a JSON file for what was found")
    o = parser.parse_args(arguments)
    began_s = time.monotonic()
    found = fuzz(o)
    row = vars(found) | {"num_cases": o.cases, "seconds": round(time.monotonic() - began_s, 1)}
    if o.out is not None:
        o.out.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps({name: value for name, value in row.items() if name != "problems"}, indent=1))
    for problem in found.problems:
        print(f"WRONG: {problem[:1000]}", file=sys.stderr)
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
