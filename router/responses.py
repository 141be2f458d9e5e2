"""A generation's answer over ASGI: its first token before the status, its end when the client goes."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from replicas.errors import TriadError
from router.answer import Answer, Counts, delta_event, whole_body
from router.errors import shortened
from router.generation import Generation, Interval
from router.paths import DIRECT
from router.request_log import RequestLog

MAX_WARNING_LEN = 500
EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

FEW_STREAMS = 4
"""Streams of an ingress up to which each step of the engine is a chunk."""
MAX_CHUNKS_PER_S = 2000.0
"""Chunks a second that an ingress sends of more streams than those: about a fifth of a core."""
MAX_INTERVAL_S = 0.04
"""The longest time for which chunks are held back to be sent as one."""


def chunk_interval_s(num_streams: int) -> float:
    """Returns the least time between two chunks of a stream, where so many run at an ingress."""
    return min(MAX_INTERVAL_S, max(0, num_streams - FEW_STREAMS) / MAX_CHUNKS_PER_S)


class GenerationResponse(Response):
    """Runs a generation while it answers; a TriadError before the first byte leaves as an exception.

    interval_s: gives the least time between two pieces of a stream
    as_sent: gives an error in the names that the client used
    """

    def __init__(
        self,
        generation: Generation,
        answer: Answer,
        stream: bool,
        record: RequestLog,
        interval_s: Interval = lambda: 0.0,
        as_sent: Callable[[TriadError], TriadError] = lambda error: error,
    ):
        super().__init__()
        self._as_sent = as_sent
        self._interval_s = interval_s
        self._record = record.of(generation)
        self._generation = generation
        self._answer = answer
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        def reply() -> Awaitable[None]:
            if not self._stream:
                return self._reply_whole(send)
            return self._reply_in_events(send, scope.get(DIRECT, send))

        with self._record:
            try:
                await run_until_disconnect(receive, reply)
            except TriadError as error:
                raise self._as_sent(error) from error.__cause__

    async def _reply_whole(self, send: Send) -> None:
        async with self._generation as generation:
            self._record.first_token()
            choices = await generation.whole()
            assert generation.finished is not None
            answer = self._answer_to(generation)
            pieces = await whole_body(answer, choices, generation.finished)
        num_bytes = sum(map(len, pieces))
        headers = {"content-type": "application/json", "content-length": str(num_bytes)}
        await _start(send, headers | _warning(generation))
        for piece in pieces[:-1]:
            await _send_part(send, piece)
        await send({"type": "http.response.body", "body": pieces[-1]})

    def _answer_to(self, generation: Generation) -> Answer:
        told = generation.accepted.prompt_token_ids
        return replace(self._answer, prompt_token_ids=told) if told else self._answer

    async def _reply_in_events(self, send: Send, send_part: Send) -> None:
        """send_part: takes what stands between a stream's beginning and its end, at which alone middleware
        looks"""
        async with self._generation as generation, aclosing(generation.deltas(self._interval_s)) as news:
            self._record.first_token()
            so_far = Counts(generation.accepted.num_prompt_tokens)
            answer = self._answer_to(generation)
            head = answer.head(so_far)
            num_open = answer.num_choices
            await _start(send, EVENT_STREAM | _warning(generation))
            try:
                async for deltas in news:
                    part = head
                    head = b""
                    for delta in deltas:
                        so_far = Counts(so_far.num_prompt, so_far.num_completion + delta.num_tokens)
                        if answer.shows(delta):
                            part += await delta_event(answer, delta, so_far)
                        if delta.reason is None:
                            continue
                        num_open -= 1
                        if num_open:
                            part += answer.end(delta, so_far)
                        else:  # with the tail
                            last_delta = delta
                    if part:
                        await _send_part(send_part, part)
                assert generation.finished is not None
                last = head + answer.tail(last_delta, generation.finished)
            except TriadError as error:
                self._record.failed(error)
                last = head + answer.failure(self._as_sent(error))
        await send({"type": "http.response.body", "body": last})


async def run_until_disconnect(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Runs `work` and cancels it when the client disconnects. Returns when it has ended; raises its error.

    It runs in a task of its own: the caller's stands below some twenty layers of the server and its
    middleware, each of which would be gone through again whenever a chunk wakes it.
    """
    has_gone = False
    working = asyncio.ensure_future(work())

    async def watch() -> None:
        nonlocal has_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        has_gone = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        await working
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not has_gone or (task is not None and task.cancelling()):
            raise
    finally:
        watching.cancel()


def _warning(generation: Generation) -> dict[str, str]:
    """The header of RFC 7234 that says what of a request is not kept to, if anything."""
    if generation.accepted.warning is None:
        return {}
    text = shortened(generation.accepted.warning, MAX_WARNING_LEN).encode("ascii", "replace").decode()
    plain = "".join(char if char.isprintable() and char not in '"\\' else "'" for char in text)
    return {"warning": f'199 triad "{plain}"'}


async def _start(send: Send, headers: Mapping[str, str]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
