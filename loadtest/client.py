"""The asyncio client: open loop at given times, or a number of users in a closed loop."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from loadtest.arrivals import Arrival
from loadtest.records import Clock, ErrorKind, Record
from loadtest.stream import StreamReader, fail_by_status
from loadtest.workloads import Ask, Workload

PATH = "/v1/chat/completions"
KEY_VARIABLE = "TRIAD_API_KEY"
"""The environment variable of the API key, where no option gives one; other users of a machine see
options."""


def bearer(api_key: str | None) -> dict[str, str]:
    """The header that shows the key, on whatever is asked for; nothing without a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


@dataclass(frozen=True)
class Target:
    """One OpenAI-compatible server and how to ask it."""

    setting: str
    url: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of each body, such as `decoding`."""
    api_key: str | None = None


@dataclass(frozen=True)
class Stage:
    """One level of load."""

    name: str
    level: float | None = None
    """Requests a second, or users; None where it varies."""
    turn: int = 0


@dataclass
class Progress:
    """The counts of requests in a stage so far."""

    sent: int = 0
    ended: int = 0
    failed: int = 0

    @property
    def in_flight(self) -> int:
        return self.sent - self.ended


class Client:
    """Sends and records. One session, any number of streams; lives in one event loop."""

    def __init__(self, *, timeout_s: float = 120.0, clock: Callable[[], float] | None = None):
        self._timeout_s = timeout_s
        self._clock = clock or Clock()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._session is not None
        await self._session.close()

    def now_s(self) -> float:
        return self._clock()

    async def get(self, url: str, api_key: str | None = None) -> Any:
        """A JSON answer. Raises aiohttp.ClientError, TimeoutError or ValueError."""
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=10.0)
        async with self._session.get(url, timeout=timeout, headers=bearer(api_key)) as response:
            response.raise_for_status()
            return json.loads(await response.read())

    async def send(self, target: Target, stage: Stage, ask: Ask, intended_s: float) -> tuple[Record, str]:
        """One request, from sending to the last byte. Any failure is in the record, with the text so far."""
        assert self._session is not None
        record = Record(
            target.setting,
            stage.name,
            ask.workload,
            ask.class_name,
            intended_s,
            level=stage.level,
            turn=stage.turn,
        )
        reader = StreamReader(record)
        body = ask.body(target.model, target.extra)
        record.sent_s = self._clock()
        try:
            async with self._session.post(
                target.url + PATH, json=body, headers=bearer(target.api_key)
            ) as response:
                record.status = response.status
                if response.status != 200:
                    fail_by_status(record, response.status, await response.text(errors="replace"))
                else:
                    async for piece in response.content.iter_any():
                        reader.feed(piece, self._clock())
                        if reader.done:
                            break
                    reader.close(ask.check, ask.expected)
        except TimeoutError:
            record.fail(ErrorKind.TIMEOUT, f"no end within {self._timeout_s:g} s")
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError) as error:
            begun = record.status is not None
            record.fail(ErrorKind.TRUNCATED if begun else ErrorKind.CONNECTION, str(error))
        except (aiohttp.ClientError, OSError) as error:
            # A reset in the middle of a body is a truncated stream; before the status it is no connection.
            begun = record.status == 200
            record.fail(ErrorKind.TRUNCATED if begun else ErrorKind.CONNECTION, str(error))
        record.end_s = self._clock()
        return record, reader.text

    async def open_loop(
        self,
        target: Target,
        stage: Stage,
        workload: Workload,
        arrivals: Sequence[Arrival],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Record]:
        """Sends at the arrivals' times whatever comes back, and waits for every answer."""
        progress = progress if progress is not None else Progress()
        rng = random.Random(seed)
        asks = [workload.draw(rng, arrival) for arrival in arrivals]  # drawn before the clock runs
        start_s = self._clock() + 0.05
        async with asyncio.TaskGroup() as group:
            tasks = []
            for arrival, ask in zip(arrivals, asks, strict=True):
                due_s = start_s + arrival.at_s
                await asyncio.sleep(max(0.0, due_s - self._clock()))
                tasks.append(group.create_task(self._counted(target, stage, ask, due_s, progress)))
        return [task.result() for task in tasks]

    async def closed_loop(
        self,
        target: Target,
        stage: Stage,
        workload: Workload,
        num_users: int,
        duration_s: float,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Record]:
        """Each user asks again as soon as it is answered; a request is due when its user is free."""
        progress = progress if progress is not None else Progress()
        end_s = self._clock() + duration_s
        records: list[Record] = []

        async def user(number: int) -> None:
            rng = random.Random(f"{seed}/{number}")
            while (now_s := self._clock()) < end_s:
                ask = workload.draw(rng, Arrival(0.0))
                record = await self._counted(target, stage, ask, now_s, progress)
                records.append(record)
                if record.error is not None:
                    await asyncio.sleep(min(0.2, max(0.0, end_s - self._clock())))  # no storm on a refusal

        async with asyncio.TaskGroup() as group:
            for number in range(num_users):
                group.create_task(user(number))
        return records

    async def _counted(
        self, target: Target, stage: Stage, ask: Ask, due_s: float, progress: Progress
    ) -> Record:
        progress.sent += 1
        record, _ = await self.send(target, stage, ask, due_s)
        progress.ended += 1
        progress.failed += record.error is not None
        return record
