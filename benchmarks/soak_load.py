"""The soak's clients: every kind of request there is, and a verdict on how each ended."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "triad-5m"
PATH = "/v1/chat/completions"
END_WITHIN_S = 90.0
"""The time after which a request that has not ended hangs."""
SUBJECTS = ("Anna", "a fox", "the sea", "two trains", "a clock", "rain", "a lamp", "the moon")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LOSSLESS = {"mode": "auto", "lossless": True}
DECODING = (
    *({"mode": "auto"} for _ in range(3)),
    LOSSLESS,
    {"mode": "ar"},
    {"mode": "diffusion", "block_length": 16},
    {"mode": "diffusion", "threshold": 0.6},
    {"mode": "self_speculation"},
    {"mode": "self_speculation", "block_length": 8},
)
SHED = {429, 503}
Excused = Callable[[float], bool]
"""True if a request that ran since then (time.monotonic) may have lost its replica."""


@dataclass
class Tally:
    """The verdicts so far."""

    ends: Counter[str] = field(default_factory=Counter)
    """The number of requests that ended in each way."""
    broken: list[str] = field(default_factory=list)
    """The first few things that should not have been."""
    num_broken: int = 0

    def ended(self, how: str) -> None:
        self.ends[how] += 1

    def wrong(self, what: str) -> None:
        self.num_broken += 1
        if len(self.broken) < 20:
            self.broken.append(what)


@dataclass(frozen=True, slots=True)
class Plan:
    """One request, and what its client does with the answer: by default it reads it all."""

    body: dict[str, Any]
    pause_s: float = 0.0
    """The client reads slowly, with such a pause after each event."""
    leave_after: int | None = None
    """The client leaves after so many events."""
    leave_after_s: float | None = None
    """The client leaves after such a time."""
    may_be_late: bool = False
    """If true, the request's own timeout may end it."""
    is_bad: bool = False
    """If true, the server has to refuse the request."""


def draw(rng: random.Random) -> Plan:
    message = {"role": "user", "content": f"Write a short story about {rng.choice(SUBJECTS)}."}
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [message],
        "max_tokens": rng.choice((1, 8, 32, 64, 128)),
        "temperature": rng.choice((0, 0, 0.8)),
        "seed": rng.randrange(1000),
        "ignore_eos": True,
        "stream": rng.random() < 0.7,
        "decoding": rng.choice(DECODING),
    }
    extra = rng.random()
    if extra < 0.1:
        body["n"] = 3
    elif extra < 0.2:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
        body |= {"response_format": form, "max_tokens": 100, "ignore_eos": False, "decoding": LOSSLESS}
    elif extra < 0.25:
        body |= {"logprobs": True, "top_logprobs": 2, "decoding": LOSSLESS}
    elif extra < 0.3:
        body["stop"] = ["the", "."]
    elif extra < 0.35:
        message["content"] = " ".join(rng.choice(SUBJECTS) for _ in range(rng.randint(40, 100)))
    does = rng.random()
    if does < 0.08:
        return Plan(body | {"stream": True}, leave_after=rng.randint(1, 6))
    if does < 0.12:
        return Plan(body, leave_after_s=rng.uniform(0.0, 0.1))
    if does < 0.2:
        return Plan(body | {"stream": True}, pause_s=rng.uniform(0.02, 0.1))
    if does < 0.24:
        return Plan(body | {"timeout_s": rng.choice((0.02, 0.2))}, may_be_late=True)
    if does < 0.28:
        return Plan(body | {"temperature": 9}, is_bad=True)
    return Plan(body)


class Clients:
    """The clients of a soak; bursts too are asked through `ask`.

    excused: as Excused says
    """

    def __init__(self, http: httpx.AsyncClient, tally: Tally, excused: Excused):
        self._http = http
        self._tally = tally
        self._excused = excused

    async def ask(self, plan: Plan) -> None:
        """Sends one request, and tells the tally how it ended. Raises nothing of the request's."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(END_WITHIN_S):
                reply = self._stream(plan, began_s) if plan.body["stream"] else self._whole(plan, began_s)
                if plan.leave_after_s is None:
                    await reply
                    return
                try:
                    async with asyncio.timeout(plan.leave_after_s):
                        await reply
                except TimeoutError:
                    self._tally.ended("left before an answer")
        except TimeoutError:
            self._tally.wrong(f"no end within {END_WITHIN_S:g} s: {plan}")
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self._tally.wrong(f"{type(error).__name__} {error}: {plan}")

    async def _whole(self, plan: Plan, began_s: float) -> None:
        response = await self._http.post(PATH, json=plan.body)
        if response.status_code != 200:
            self._refused(plan, response.status_code, response.json()["error"], began_s)
            return
        choices = response.json()["choices"]
        self._whole_choices(plan, [choice["finish_reason"] for choice in choices])
        if "response_format" in plan.body:
            for choice in choices:
                if choice["finish_reason"] == "stop":  # else max_tokens cut it
                    json.loads(choice["message"]["content"])

    async def _stream(self, plan: Plan, began_s: float) -> None:
        async with self._http.stream("POST", PATH, json=plan.body) as response:
            if response.status_code != 200:
                await response.aread()
                self._refused(plan, response.status_code, response.json()["error"], began_s)
                return
            reasons: dict[int, str] = {}
            last = ""
            num_events = 0
            async for line in response.aiter_lines():
                if not line:
                    continue
                if last:
                    self._tally.wrong(f"{line!r} after {last!r}: {plan}")
                if line == "event: error":
                    continue
                data = line.removeprefix("data: ")
                chunk = {} if data == "[DONE]" else json.loads(data)
                if data == "[DONE]" or "error" in chunk:
                    last = data
                for choice in chunk.get("choices", ()):
                    if choice["finish_reason"] is not None:
                        reasons[choice["index"]] = choice["finish_reason"]
                num_events += 1
                if num_events == plan.leave_after:
                    self._tally.ended("left in mid-stream")
                    return
                if plan.pause_s:
                    await asyncio.sleep(plan.pause_s)
        if not last:
            self._tally.wrong(f"a stream without an end: {plan}")
        elif last == "[DONE]":
            self._whole_choices(plan, list(reasons.values()))
        else:
            self._broke_off(plan, json.loads(last)["error"], began_s)

    def _whole_choices(self, plan: Plan, reasons: list[str]) -> None:
        if len(reasons) != plan.body.get("n", 1) or not set(reasons) <= {"stop", "length"}:
            self._tally.wrong(f"ended with {reasons}: {plan}")
        elif plan.is_bad:
            self._tally.wrong(f"taken though it is wrong: {plan}")
        else:
            self._tally.ended("complete")

    def _refused(self, plan: Plan, status: int, error: dict[str, Any], began_s: float) -> None:
        if plan.is_bad and status == 400:
            self._tally.ended("400, as it should be")
        elif status in SHED:
            self._tally.ended(f"{status} {error['code']}")
        elif status == 504 and plan.may_be_late:
            self._tally.ended("504 deadline")
        else:
            self._tally.wrong(f"{status} {error}: {plan}")

    def _broke_off(self, plan: Plan, error: dict[str, Any], began_s: float) -> None:
        if error["code"] == "unavailable" and self._excused(began_s):
            self._tally.ended("SSE error: its replica was killed")
        elif error["code"] == "deadline_exceeded" and plan.may_be_late:
            self._tally.ended("SSE error: deadline")
        else:
            self._tally.wrong(f"SSE error {error}: {plan}")
