"""The parts of the measurement. Within each the contenders take turns on one server."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.policy.contenders import AUTO, rotated
from benchmarks.policy.neighbour import neighbour
from benchmarks.policy.windows import Bench, Place

RAMP = (1, 2, 4, 8, 16, 32, 64, 32, 16, 8, 4, 2, 1)
SQUARE = (1, 64) * 3
BUSY_S = 5.0
"""The time of each cycle for which the neighbour keeps a core busy."""
CYCLE_S = 15.0
STEADY_FROM_S = 10.0
LOOKS_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """How much is measured."""

    levels: tuple[int, ...]
    turns: int
    seconds: float
    """Of a window."""
    settle_s: float
    """From a change of the load to the window, for every contender."""
    step_s: float
    """Of a step of the ramp or the square wave; all of it counts."""
    steady_s: float
    """Of a load held constant, after STEADY_FROM_S."""
    start_s: int
    """Of the windows of 1 s from a server's start on."""


async def warm_up(bench: Bench, seconds: float) -> None:
    async with bench.clients(AUTO) as clients:
        clients.set_number(4)
        await clients.hold(seconds)


async def levels(bench: Bench, contenders: tuple[str, ...], lengths: Lengths, turn: int) -> None:
    """At each level every contender in turn, the order rotated."""
    for step, level in enumerate(lengths.levels):
        for contender in rotated(contenders, turn + step):
            await _level(bench, contender, level, lengths, turn, "levels")


async def neighboured(bench: Bench, contenders: tuple[str, ...], lengths: Lengths, turn: int) -> None:
    """The same beside a neighbour that is busy for BUSY_S: a cycle of CYCLE_S in windows of BUSY_S, and one
    more that begins 10 s after the neighbour has ended."""
    for step, level in enumerate(lengths.levels):
        for contender in rotated(contenders, turn + step):
            async with bench.clients(contender) as clients:
                clients.set_number(level)
                await clients.hold(lengths.settle_s)
                began_s = time.monotonic()
                with neighbour(BUSY_S):
                    for number in range(int(CYCLE_S / BUSY_S) + 1):
                        at_s = number * BUSY_S
                        label = "cycle" if at_s < CYCLE_S else "after"
                        place = Place("neighbour", contender, level, turn, time.monotonic() - began_s, label)
                        left_s = began_s + at_s + BUSY_S - time.monotonic()
                        await bench.window(clients, left_s, place, num_looks=0)


async def wave(
    bench: Bench, contenders: tuple[str, ...], lengths: Lengths, turn: int, part: str, steps: Sequence[int]
) -> None:
    """Each contender goes through all the steps, without a pause between them."""
    for contender in rotated(contenders, turn):
        async with bench.clients(contender) as clients:
            for number, num_clients in enumerate(steps):
                clients.set_number(num_clients)
                place = Place(part, contender, num_clients, turn, number * lengths.step_s, str(number))
                await bench.window(clients, lengths.step_s, place, num_looks=1)


async def steady(bench: Bench, lengths: Lengths, turn: int) -> None:
    """`auto` at each level, held constant: how often the plan changes, and what the trials make."""
    for level in lengths.levels:
        async with bench.clients(AUTO) as clients:
            clients.set_number(level)
            await clients.hold(STEADY_FROM_S)
            num_looks = max(1, round(lengths.steady_s / LOOKS_EVERY_S))
            place = Place("steady", AUTO, level, turn, STEADY_FROM_S)
            await bench.window(clients, lengths.steady_s, place, num_looks, counts_shifts=True)


async def start(
    bench: Bench, contenders: tuple[str, ...], lengths: Lengths, turn: int, level: int, ready_s: float
) -> None:
    """`auto` from the moment that /readyz said 200, second by second, and then the fixed settings.

    ready_s: that moment, by time.monotonic
    """
    async with bench.clients(AUTO) as clients:
        clients.set_number(level)
        for number in range(lengths.start_s):
            at_s = time.monotonic() - ready_s
            place = Place("start", AUTO, level, turn, at_s, f"second {number}")
            await bench.window(clients, ready_s + number + 1 - time.monotonic(), place, num_looks=0)
    for contender in rotated(contenders, turn):
        if contender != AUTO:
            await _level(bench, contender, level, lengths, turn, "start")


async def _level(bench: Bench, contender: str, level: int, lengths: Lengths, turn: int, part: str) -> None:
    async with bench.clients(contender) as clients:
        clients.set_number(level)
        await clients.hold(lengths.settle_s)
        place = Place(part, contender, level, turn, lengths.settle_s)
        await bench.window(clients, lengths.seconds, place)
