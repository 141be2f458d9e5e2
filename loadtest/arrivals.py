"""Arrival times of requests: seeded Poisson and gamma-bursty processes of any shape, and recorded traces.

An open loop sends at these times whether or not earlier answers have come, so a slow server meets the queue
that real users would make. Pure: the same arguments give the same arrivals.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.shapes import Shape, Soak

_GRID_S = 0.01
"""The step in which a shape's level is integrated."""
_MAX_GRID = 1_000_000


class TraceError(ValueError):
    """A trace that cannot be read; the message names the line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come; the fields but at_s are set where a trace gives them."""

    at_s: float
    """Seconds from the start."""
    prompt_len: int | None = None
    """Tokens of the prompt."""
    output_len: int | None = None
    """Tokens of the answer."""
    class_name: str | None = None


def poisson(rate: float | Shape, duration_s: float | None = None, *, seed: int = 0) -> tuple[Arrival, ...]:
    """Draws independent arrivals: `gamma` with burstiness 1."""
    return gamma(rate, duration_s, burstiness=1.0, seed=seed)


def gamma(
    rate: float | Shape, duration_s: float | None = None, *, burstiness: float, seed: int = 0
) -> tuple[Arrival, ...]:
    """Draws a renewal process with gamma gaps, in time order, from 0 up to the end, which is left out.

    rate: requests/s, or a shape of it, whose duration is then the duration
    burstiness: the gamma's shape parameter, as `vllm bench serve` has it: 1 is Poisson, below it arrivals
    come in bursts (coefficient of variation of the gaps 1/sqrt(burstiness)), above it evenly

    A varying rate is had by time change: unit-rate arrivals go through the inverse of the integrated rate,
    which for burstiness 1 is exactly the inhomogeneous Poisson process (Cinlar 1975). Raises ValueError.
    """
    if isinstance(rate, Shape):
        if duration_s is not None:
            raise ValueError("a shape has its own duration; leave duration_s out")
        shape = rate
    else:
        if duration_s is None:
            raise ValueError("a constant rate needs duration_s")
        shape = Soak(duration_s, rate)
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ValueError(f"burstiness must be above 0, got {burstiness}")
    times, expected = _integrated(shape)
    rng = np.random.default_rng(seed)
    arrived: list[np.ndarray] = []
    reached = 0.0
    while reached < expected[-1]:
        num = int(expected[-1] - reached) + 64
        units = reached + np.cumsum(rng.gamma(burstiness, 1 / burstiness, num))
        arrived.append(units)
        reached = float(units[-1])
    units = np.concatenate(arrived) if arrived else np.empty(0)
    at_s = np.interp(units[units < expected[-1]], expected, times)
    return tuple(Arrival(float(t)) for t in at_s if t < shape.duration_s)


def _integrated(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Times and the arrivals expected up to each, both (cells + 1,), by the midpoint rule."""
    num_cells = min(_MAX_GRID, max(1, math.ceil(shape.duration_s / _GRID_S)))
    times = np.linspace(0.0, shape.duration_s, num_cells + 1)
    middles = (times[:-1] + times[1:]) / 2
    levels = np.fromiter((shape.level(float(t)) for t in middles), float, num_cells)
    return times, np.concatenate(([0.0], np.cumsum(levels * np.diff(times))))


def fixed_rate(rate: float, duration_s: float) -> tuple[Arrival, ...]:
    """Evenly spaced arrivals, the first at 0."""
    Soak(duration_s, rate)  # checks both
    return tuple(Arrival(k / rate) for k in range(math.ceil(rate * duration_s)))


_TRACE_KEYS = {
    "timestamp": "timestamp",
    "prompt_len": "prompt_len",
    "input_length": "prompt_len",
    "output_len": "output_len",
    "output_length": "output_len",
    "class": "class",
}
"""The keys of a line. Mooncake's traces say input_length and output_length, and milliseconds."""


def read_trace(
    path: Path, *, unit_s: float = 1.0, speed: float = 1.0, limit: int | None = None
) -> tuple[Arrival, ...]:
    """Reads a JSONL trace, a request a line: timestamp; if known, prompt_len, output_len (tokens) and class.

    unit_s: seconds in one unit of timestamp (0.001 for Mooncake's)
    speed: 2 replays in half the time

    Times count from the earliest line; lines may be in any order; other keys are left alone. Raises
    TraceError.
    """
    if not (unit_s > 0 and speed > 0):
        raise TraceError(f"unit_s and speed must be above 0, got {unit_s} and {speed}")
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append(_arrival(line, f"{path}:{number}"))
    if not found:
        raise TraceError(f"{path} has no requests")
    found.sort(key=lambda arrival: arrival.at_s)
    start = found[0].at_s
    scaled = [replace(a, at_s=(a.at_s - start) * unit_s / speed) for a in found]
    return tuple(scaled[:limit])


def _arrival(line: str, where: str) -> Arrival:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise TraceError(f"{where}: a line is a JSON object with a timestamp")
    known: dict[str, Any] = {_TRACE_KEYS[key]: value for key, value in row.items() if key in _TRACE_KEYS}
    at = known.get("timestamp")
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
        raise TraceError(f"{where}: timestamp must be a number, got {at!r}")
    for key in ("prompt_len", "output_len"):
        length = known.get(key)
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise TraceError(f"{where}: {key} must be a whole number of tokens above 0, got {length!r}")
    class_name = known.get("class")
    if class_name is not None and not isinstance(class_name, str):
        raise TraceError(f"{where}: class must be a string, got {class_name!r}")
    return Arrival(float(at), known.get("prompt_len"), known.get("output_len"), class_name)


def write_trace(arrivals: Iterable[Arrival], path: Path) -> None:
    """Writes a trace as `read_trace` reads it, in seconds."""
    with path.open("w", encoding="utf-8") as out:
        for a in arrivals:
            row = {
                "timestamp": a.at_s,
                "prompt_len": a.prompt_len,
                "output_len": a.output_len,
                "class": a.class_name,
            }
            out.write(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")


def coefficient_of_variation(arrivals: Sequence[Arrival]) -> float:
    """The variation of gaps: 1 for Poisson, above for bursts. Raises ValueError for fewer than 3 arrivals."""
    if len(arrivals) < 3:
        raise ValueError("gaps vary only among three arrivals or more")
    gaps = np.diff([a.at_s for a in arrivals])
    return float(gaps.std() / gaps.mean())
