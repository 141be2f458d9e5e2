"""Streaming completions in a closed loop, counted token by token, by clients that cost next to nothing.

Each client keeps a connection. Every chunk says how many tokens there are so far (`continuous_usage_stats`),
so tokens count when they arrive and a window needs no whole requests; nothing else of a chunk is parsed.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from benchmarks.load import LoadError

TIMEOUT_S = 120.0
MAX_ERRORS = 20
_COUNT = b'"completion_tokens":'


@dataclass(slots=True)
class Tally:
    """What has arrived so far; it only grows."""

    num_tokens: int = 0
    num_chunks: int = 0
    """Events of streams, the first and the last ones too."""
    num_requests: int = 0
    """Requests that have ended well."""
    num_errors: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    """Seconds to the first token of each request that has ended."""
    tpots_s: list[float] = field(default_factory=list)
    """Seconds a token after the first of each request that has ended."""

    def note_end(self, began_s: float, first_s: float | None, num_tokens: int) -> None:
        """Notes a request's end, now; its tokens are counted already. Times are of time.perf_counter."""
        self.num_requests += 1
        if first_s is not None:
            self.ttfts_s.append(first_s - began_s)
            if num_tokens > 1:
                self.tpots_s.append((time.perf_counter() - first_s) / (num_tokens - 1))


Ask: TypeAlias = Callable[[str, Tally], Awaitable[None]]
"""Answers one prompt, noting in the tally what arrives. Raises LoadError."""
Opener: TypeAlias = Callable[[], AbstractAsyncContextManager[Ask]]
"""Opens what one client asks by."""


class Clients:
    """As many clients as are wanted, each with one request at a time; prompts go round."""

    def __init__(self, opener: Opener, prompts: Sequence[str]):
        self.tally = Tally()
        self._opener = opener
        self._prompts = itertools.cycle(prompts)
        self._num_wanted = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def set_number(self, num_clients: int) -> None:
        """Starts clients that are missing, at once; those too many leave after their request."""
        self._num_wanted = num_clients
        for number in range(num_clients):
            if number not in self._tasks or self._tasks[number].done():
                self._tasks[number] = asyncio.create_task(self._run(number))

    async def hold(self, seconds: float) -> None:
        """Waits while they run. Raises LoadError as soon as one whose requests all fail gives up."""
        ended, _ = await asyncio.wait(
            self._tasks.values(), timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in ended:
            task.result()

    async def leave(self) -> None:
        """Waits for all to end their requests. Raises LoadError as hold does."""
        self.set_number(0)
        await asyncio.gather(*self._tasks.values())
        self._tasks.clear()

    async def _run(self, number: int) -> None:
        num_failed = 0
        async with self._opener() as ask:
            while number < self._num_wanted:
                try:
                    await ask(next(self._prompts), self.tally)
                    num_failed = 0
                except LoadError:
                    self.tally.num_errors += 1
                    num_failed += 1
                    if num_failed == MAX_ERRORS:
                        raise


def over_http(
    port: int, model: str, max_tokens: int, ignore_eos: bool, decoding: Mapping[str, Any]
) -> Opener:
    """Clients of a server on loopback, whose requests are greedy chat completions."""
    requests: dict[str, bytes] = {}

    @asynccontextmanager
    async def opener() -> AsyncIterator[Ask]:
        connection = StreamConnection(port)

        async def ask(prompt: str, tally: Tally) -> None:
            if prompt not in requests:
                requests[prompt] = request_bytes(model, prompt, max_tokens, ignore_eos, decoding)
            await connection.ask(requests[prompt], tally)

        try:
            yield ask
        finally:
            connection.close()

    return opener


def request_bytes(
    model: str, prompt: str, max_tokens: int, ignore_eos: bool, decoding: Mapping[str, Any]
) -> bytes:
    """A streaming chat request, head and body."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "ignore_eos": ignore_eos,
            "decoding": dict(decoding),
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class StreamConnection:
    """A connection on loopback, made anew where it was lost, on which one request at a time is answered."""

    def __init__(self, port: int):
        self._port = port
        self._link: _Link | None = None

    async def ask(self, request: bytes, tally: Tally) -> None:
        """Sends a request of request_bytes and waits for the stream's end.

        Raises LoadError where the stream is not whole or takes longer than TIMEOUT_S; the connection is
        closed then.
        """
        loop = asyncio.get_running_loop()
        exchange = _Exchange(tally, loop.create_future())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if self._link is None or self._link.is_lost:
                    _, self._link = await loop.create_connection(_Link, "127.0.0.1", self._port)
                self._link.send(request, exchange)
                await exchange.ended
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError | OSError):
                raise LoadError(f"{type(error).__name__}: {error}") from error
            raise
        tally.note_end(exchange.began_s, exchange.first_s, exchange.num_tokens)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class _Link(asyncio.Protocol):
    """One TCP connection."""

    is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._exchange: _Exchange | None = None

    def send(self, request: bytes, exchange: "_Exchange") -> None:
        self._exchange = exchange
        self._transport.write(request)

    def close(self) -> None:
        self._exchange = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None and not self._exchange.ended.done():
            self._exchange.feed(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self._exchange is not None and not self._exchange.ended.done():
            self._exchange.fail(f"the connection was lost: {error}")


class _Exchange:
    """The answer to one request as it comes in."""

    def __init__(self, tally: Tally, ended: asyncio.Future[None]):
        self.ended = ended
        self.began_s = time.perf_counter()
        self.first_s: float | None = None
        self.num_tokens = 0
        self._tally = tally
        self._received = b""
        self._has_head = self._is_done = False

    def fail(self, message: str) -> None:
        self.ended.set_exception(LoadError(message))

    def feed(self, data: bytes) -> None:
        self._received += data
        if not self._has_head and not self._take_head():
            return
        events, mark, rest = self._received.rpartition(b"\n\n")
        if mark:
            self._received = rest
            self._take_events(events)
        # The last chunk of the body's encoding; only after it may the next request go out.
        if self._is_done and not self.ended.done() and self._received.endswith(b"\r\n0\r\n\r\n"):
            self.ended.set_result(None)

    def _take_head(self) -> bool:
        head, mark, rest = self._received.partition(b"\r\n\r\n")
        if not mark:
            return False
        if head.split(b" ", 2)[1:2] != [b"200"]:
            self.fail(f"not answered: {self._received[:1000]!r}")
            return False
        self._received, self._has_head = rest, True
        return True

    def _take_events(self, events: bytes) -> None:
        """Takes whole events, the last one's end cut off."""
        if b'"error":' in events:
            self.fail(f"ended by an error: {events[-1000:]!r}")
            return
        self._tally.num_chunks += events.count(b"data: {")
        self._is_done = events.endswith(b"data: [DONE]")
        start = events.rfind(_COUNT) + len(_COUNT)
        if start < len(_COUNT):
            return
        num_tokens = int(events[start : start + 12].partition(b",")[0].partition(b"}")[0])
        self._tally.num_tokens += num_tokens - self.num_tokens
        if num_tokens and self.first_s is None:
            self.first_s = time.perf_counter()
        self.num_tokens = num_tokens
