"""Reads one OpenAI stream into its record. No I/O, so the asyncio client and locust's share it."""

import json
from collections.abc import Callable
from typing import Any

from loadtest.records import Chunk, ErrorKind, Record


class EventReader:
    """Splits bytes that come in any pieces into server-sent events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that this piece completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        complete = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                complete.append(b"\n".join(self._data).decode(errors="replace"))
                self._data.clear()
        return complete


class StreamReader:
    """Fills a record from the body of a 200 answer; `close` says what the end amounts to."""

    def __init__(self, record: Record):
        self.record = record
        self._events = EventReader()
        self._text: list[str] = []
        self._counted = 0
        self._done = False

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def done(self) -> bool:
        """True once [DONE] has come, or nothing more can be made of the stream."""
        return self._done or self.record.error is not None

    def feed(self, piece: bytes, at_s: float) -> None:
        for data in self._events.feed(piece):
            if self.done:
                return
            if data == "[DONE]":
                self._done = True
                return
            try:
                self._take(json.loads(data), at_s)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                self.record.fail(ErrorKind.MALFORMED, f"{type(error).__name__}: {error} in {data}")

    def _take(self, body: dict[str, Any], at_s: float) -> None:
        record = self.record
        if body.get("error"):
            record.fail(ErrorKind.ERROR_EVENT, str(body["error"].get("message")))
            return
        record.decoding = body.get("decoding") or record.decoding
        usage = body.get("usage")
        num_new = None
        if usage:
            record.prompt_tokens = usage["prompt_tokens"]
            record.output_tokens = usage["completion_tokens"]
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            num_new = record.output_tokens - self._counted if record.output_tokens is not None else None
            self._counted = record.output_tokens or 0
        for choice in body["choices"]:
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
            if text:
                self._text.append(text)
                record.chunks.append(Chunk(at_s, len(text), num_new))
            record.finish_reason = choice.get("finish_reason") or record.finish_reason

    def close(self, check: Callable[[str], bool] | None = None, expected: str | None = None) -> None:
        """Judges the record after the last byte.

        check: tells whether the answer is right; expected: the text it must be
        """
        record = self.record
        if record.finish_reason is None:
            record.fail(ErrorKind.TRUNCATED, f"ended after {len(self.text)} characters, no finish reason")
        elif not self._done:
            record.fail(ErrorKind.MISSING_DONE, "the stream ended without [DONE]")
        if record.error is not None:
            return
        if expected is not None and self.text != expected:
            record.fail(ErrorKind.WRONG_TEXT, f"expected {expected[:120]!r}, got {self.text[:120]!r}")
        if check is not None:
            record.correct = record.finish_reason == "stop" and check(self.text)


def fail_by_status(record: Record, status: int, body: str) -> None:
    """Notes the failure of an answer that is no stream."""
    known = {429: ErrorKind.RATE_LIMITED, 503: ErrorKind.UNAVAILABLE}
    record.fail(known.get(status, ErrorKind.STATUS), f"{status}: {body}")
