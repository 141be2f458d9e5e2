"""The raw rows (JSONL), one a window."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One window of one contender; its tokens are those that arrived in it."""

    part: str
    contender: str
    clients: int
    turn: int
    at_s: float
    """Seconds from the last change of the load, of the neighbour or from the server's start to the window."""
    seconds: float
    tokens: int
    tokens_per_s: float
    ttft_p50_ms: float | None
    tpot_p50_ms: float | None
    """Of the requests that ended in the window, as all four."""
    tpot_p95_ms: float | None
    num_requests: int
    num_errors: int
    client_cores: float
    """The cores that this process, the client, kept busy."""
    label: str = ""
    """What the part tells windows apart by."""
    plans: list[str] = field(default_factory=list)
    """The plans seen in force."""
    forecasts: dict[str, float] = field(default_factory=dict)
    """The medians foretold at the load that ran, tokens/s by plan."""
    tokens_by_mode: dict[str, int] = field(default_factory=dict)
    num_shifts: int | None = None
    """Changes of plan, where the part counts them."""
    run: dict[str, Any] = field(default_factory=dict)
    """The machine, the commit, the day, and the options that rows must share to be compared."""


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """Raises ValueError for a row of another form."""
    return [_row(json.loads(line), path) for line in path.read_text().splitlines()]


def _row(found: Mapping[str, Any], path: Path) -> Row:
    unknown = set(found) - {entry.name for entry in fields(Row)}
    if unknown:
        raise ValueError(f"{path} has rows of another form, with {', '.join(sorted(unknown))}")
    return Row(**found)
