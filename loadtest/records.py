"""Records of requests. Times are seconds since the epoch, by one monotonic clock a process."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple


class ErrorKind(StrEnum):
    """The reason why a request has no good answer; kinds are apart because causes and remedies are."""

    RATE_LIMITED = "429"
    UNAVAILABLE = "503"
    STATUS = "other_status"
    ERROR_EVENT = "error_event"
    """The stream ended with the server's own error."""
    TRUNCATED = "truncated_stream"
    """The stream ended before a finish reason."""
    MISSING_DONE = "missing_done"
    """Everything came but the closing [DONE]."""
    MALFORMED = "malformed"
    """An event is not what OpenAI's stream has."""
    WRONG_TEXT = "wrong_text"
    """The text is not the one that this very request had when it was alone."""
    TIMEOUT = "timeout"
    CONNECTION = "connection"


class Clock:
    """Seconds since the epoch that never jump within a process."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.perf_counter()

    def __call__(self) -> float:
        return self._offset_s + time.perf_counter()


class Chunk(NamedTuple):
    """One event with text."""

    at_s: float
    num_chars: int
    num_tokens: int | None = None
    """The server's count; None where it gives none, never a guess."""


@dataclass(slots=True)
class Record:
    """One request and how it was answered."""

    setting: str
    """The thing compared: a decoding mode, a server."""
    stage: str
    """The level of load, by name."""
    workload: str
    class_name: str
    intended_s: float
    """The time at which it was due, from which latencies count, so a late client hides nothing."""
    level: float | None = None
    turn: int = 0
    """Counts from 0 where a stage is measured several times, with others in between."""
    sent_s: float | None = None
    end_s: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    status: int | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    decoding: dict[str, Any] | None = None
    """Triad's own report, if there was one."""
    correct: bool | None = None
    """The verdict of the task's checker; None where it has none."""
    error: ErrorKind | None = None
    message: str | None = None

    def fail(self, kind: ErrorKind, message: str) -> None:
        """Notes a failure; the first is the one that counts."""
        if self.error is None:
            self.error, self.message = kind, message[:300]


def to_json(record: Record) -> str:
    return json.dumps(asdict(record), separators=(",", ":"))


def from_json(line: str) -> Record:
    row = json.loads(line)
    row["chunks"] = [Chunk(*chunk) for chunk in row["chunks"]]
    row["error"] = None if row["error"] is None else ErrorKind(row["error"])
    return Record(**row)


def write_records(records: Iterable[Record], path: Path) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(to_json(record) + "\n" for record in records)


def read_records(path: Path) -> Iterator[Record]:
    """Reads the records of a file. Raises ValueError, which names the line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield from_json(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is no record of a load test: {error}") from error
