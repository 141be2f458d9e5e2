"""The stages of a load test: each level of load, each setting in turn, the same arrivals for all."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from loadtest.arrivals import Arrival, gamma
from loadtest.client import KEY_VARIABLE, Client, Progress, Stage, Target
from loadtest.observe import Observations, observe
from loadtest.records import Record
from loadtest.shapes import Shape
from loadtest.workloads import Workload

WARM_UP = 4
LOSSLESS = ("ar", "self_speculation", "lossless")
"""Settings that all give the text of ar, which is the same under any load."""


@dataclass(frozen=True)
class Load:
    """One stage to run."""

    stage: Stage
    arrivals: tuple[Arrival, ...] = ()
    """The arrivals of an open loop."""
    users: int | None = None
    """A closed loop of so many users for duration_s; None for an open loop."""
    duration_s: float = 0.0
    seed: int = 0


def levels(rates: Sequence[float], each_s: float, burstiness: float, seed: int) -> list[Load]:
    """A plateau of each rate (requests/s), all settings getting the same arrivals."""
    return [
        Load(
            Stage(f"{rate:g}/s", rate),
            gamma(rate, each_s, burstiness=burstiness, seed=seed + number),
            duration_s=each_s,
            seed=seed + number,
        )
        for number, rate in enumerate(rates)
    ]


def user_levels(counts: Sequence[int], each_s: float, seed: int) -> list[Load]:
    return [
        Load(Stage(f"{count} users", count), users=count, duration_s=each_s, seed=seed + number)
        for number, count in enumerate(counts)
    ]


def shaped(name: str, shape: Shape, burstiness: float, seed: int) -> Load:
    """One stage whose rate follows the shape."""
    arrivals = gamma(shape, burstiness=burstiness, seed=seed)
    return Load(Stage(name), arrivals, duration_s=shape.duration_s, seed=seed)


@dataclass
class Outcome:
    records: list[Record] = field(default_factory=list)
    observations: Observations = field(default_factory=Observations)


async def served_model(client: Client, url: str, api_key: str | None = None) -> str:
    """The first model's name. Raises RuntimeError, which says what was wrong with the URL or the key."""
    try:
        models = await client.get(f"{url}/v1/models", api_key)
        return str(models["data"][0]["id"])
    except aiohttp.ClientResponseError as error:
        raise RuntimeError(refused(f"{url}/v1/models", error.status)) from error
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(f"{url}/v1/models does not answer as OpenAI's API does: {error!r}") from error


def refused(what: str, status: int) -> str:
    """The message that a load test can't begin with this answer, and why."""
    if status in (401, 403):
        return f"{what} answers {status}: give the server's API key, by {KEY_VARIABLE} or an option (--help)"
    return f"{what} does not answer as OpenAI's API does: status {status}"


async def run(
    client: Client,
    loads: Sequence[tuple[Load, Sequence[Target]]],
    workload: Workload,
    *,
    on_line: Callable[[str], None] | None = None,
    pause_s: float = 1.0,
) -> Outcome:
    """Runs each load against each of its targets in turn. The settings thus alternate, level by level.

    A stage begins when the one before has ended to the last answer, so none inherits another's queue.
    pause_s: silence between stages, in which a policy comes back to rest.
    """
    outcome = Outcome()
    stages = [(load, target) for load, targets in loads for target in targets]
    watchers = [
        asyncio.create_task(observe(client, url, api_key, outcome.observations))
        for url, api_key in {target.url: target.api_key for _, target in stages}.items()
    ]
    try:
        for target in {target.setting: target for _, target in stages}.values():
            warm = Load(Stage("warm-up"), tuple(Arrival(0.1 * k) for k in range(WARM_UP)))
            await _stage(client, warm, target, workload, Progress())
        for number, (load, target) in enumerate(stages, 1):
            progress = Progress()
            head = f"[{number}/{len(stages)}] {target.setting} {load.stage.name}"
            showing = asyncio.create_task(_show(head, progress, load.duration_s, on_line))
            try:
                outcome.records += await _stage(client, load, target, workload, progress)
            finally:
                showing.cancel()
                with suppress(asyncio.CancelledError):
                    await showing
            await asyncio.sleep(pause_s)
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
    return outcome


def _stage(
    client: Client, load: Load, target: Target, workload: Workload, progress: Progress
) -> Awaitable[list[Record]]:
    if load.users is not None:
        return client.closed_loop(
            target, load.stage, workload, load.users, load.duration_s, seed=load.seed, progress=progress
        )
    return client.open_loop(target, load.stage, workload, load.arrivals, seed=load.seed, progress=progress)


async def _show(
    head: str, progress: Progress, duration_s: float, on_line: Callable[[str], None] | None
) -> None:
    began = time.monotonic()
    try:
        while on_line is not None:
            on_line(_line(head, progress, time.monotonic() - began, duration_s))
            await asyncio.sleep(0.5)
    finally:
        if on_line is not None:
            on_line(_line(head, progress, time.monotonic() - began, duration_s) + "\n")


def _line(head: str, progress: Progress, elapsed_s: float, duration_s: float) -> str:
    return (
        f"{head}: {elapsed_s:.0f}/{duration_s:.0f} s, sent {progress.sent}, in flight {progress.in_flight}, "
        f"ended {progress.ended}, failed {progress.failed}"
    )


def progress_to(stream: Any = sys.stderr) -> Callable[[str], None]:
    """A writer of one line, written over on a terminal; elsewhere only the last of each stage."""

    def write(line: str) -> None:
        if stream.isatty():
            stream.write("\r\x1b[K" + line)
        elif line.endswith("\n"):
            stream.write(line)
        stream.flush()

    return write


def decoding_settings(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The extra body fields by setting. `auto` adds nothing, so it suits servers other than Triad.

    A name is a mode, `lossless`, or a JSON object of the `decoding` field. Raises ValueError.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "auto":
            found[name] = {}
        elif name == "lossless":
            found[name] = {"decoding": {"lossless": True}}
        elif name in ("ar", "self_speculation", "diffusion"):
            found[name] = {"decoding": {"mode": name}}
        else:
            try:
                found[name] = {"decoding": dict(json.loads(name))}
            except (ValueError, TypeError):
                modes = "auto, lossless, ar, self_speculation, diffusion"
                raise ValueError(f"'{name}' is no mode: {modes}, or a JSON object of `decoding`") from None
    return found
