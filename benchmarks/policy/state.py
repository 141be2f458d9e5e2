"""What `GET /v1/triad/state` says of a server with one replica."""

import asyncio
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.policy.contenders import name_of


@dataclass(frozen=True, slots=True)
class State:
    """The replica at one moment."""

    plan: str
    """The plan that its `auto` requests run, as a contender."""
    forecasts: Mapping[str, float]
    """The tokens/s foretold under the load as it is, by plan as a contender."""
    tokens_by_mode: Mapping[str, int]
    """All tokens since the replica's start."""
    shifts: frozenset[int]
    """The versions of the plans that the last decisions shifted to."""


async def read_state(port: int) -> State:
    """Raises OSError or ValueError where the server does not give it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/triad/state HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    try:
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise ValueError(f"no state: {(head + body)[:500]!r}")
    return parsed(json.loads(body))


def parsed(state: Mapping[str, Any]) -> State:
    """Raises ValueError where there is not one replica."""
    (replica,) = state["replicas"]
    load = replica["load"]
    return State(
        _name(load["decode"]),
        {_name(entry["decode"]): entry["tokens_per_s"] for entry in replica["forecasts"]},
        load["tokens_total_by_mode"],
        frozenset(entry["plan"]["version"] for entry in state["decisions"] or [] if _is_shift(entry)),
    )


def _is_shift(decision: Mapping[str, Any]) -> bool:
    """True if the decision changes what to run, and not only by which rule."""
    before, after = decision["load"]["decode"], decision["plan"]["decode"]
    return bool(decision["changed"] and before is not None and before != after)


def _name(decode: Mapping[str, Any] | None) -> str:
    return "" if decode is None else name_of(decode["mode"], decode["block_length"])


def forecasts(states: Iterable[State]) -> dict[str, float]:
    """The median foretold by plan."""
    found: dict[str, list[float]] = {}
    for state in states:
        for name, tokens_per_s in state.forecasts.items():
            found.setdefault(name, []).append(tokens_per_s)
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def tokens_by_mode(first: State, last: State) -> dict[str, int]:
    """The tokens made between two states, of the modes that made any."""
    made = {mode: num - first.tokens_by_mode.get(mode, 0) for mode, num in last.tokens_by_mode.items()}
    return {mode: num for mode, num in made.items() if num}


def num_shifts(states: Sequence[State]) -> int:
    """The changes of plan from the first state to the last."""
    return len(frozenset().union(*(state.shifts for state in states)) - states[0].shifts)
