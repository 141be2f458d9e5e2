"""One request on its way: sent to a replica, once more where that is lost, its events taken to the end."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from itertools import chain
from types import TracebackType
from typing import Self

from replicas.errors import ErrorCode, TriadError
from replicas.messages import Accepted, Delta, Failed, Finished, FinishReason, GenerateRequest
from router.deltas import joined
from router.dispatch import Dispatcher
from router.inbox import Inbox
from router.replica_connection import FAULTS, LastWord, ReplicaConnection, ReplicaLost

MAX_LOSSES = 1
"""The failures of its replicas that a request survives, as long as nothing of it has been sent: so one that
itself brings a replica down brings down two at most."""

Interval = Callable[[], float]
"""A function that gives a number of seconds, asked again for each piece of a stream."""


class Generation:
    """One request on its way: text, and then either `finished` or one TriadError.

    A context manager: entering sends the request and waits for its first event, so that whatever
    refuses or breaks it before then is raised there; leaving it before the end, by whatever way,
    cancels the request at the replica. This is the only place that does.
    """

    def __init__(self, dispatcher: Dispatcher, request: GenerateRequest):
        self.finished: Finished | None = None
        """The end of the request, set once the text is complete."""
        self.accepted = Accepted("", 0)
        """What the replica says of the request when it accepts it."""
        self.num_tokens = 0
        """Tokens of all choices, as far as their events have been taken."""
        self.finish_reasons: dict[int, FinishReason] = {}
        """The reasons of the choices that have ended, by index."""
        self.last: Finished | Failed | None = None
        """The end at the replica that had the request last."""
        self.given_up: list[tuple[Failed, int]] = []
        """The ends at replicas before the last, each with the tokens that had come."""
        self.on_end: LastWord = lambda last: None
        """Called once with `last`, if a replica took the request, and however late it says so."""
        self._dispatcher = dispatcher
        self._request = request
        self._deadline_s = None if request.timeout_s is None else dispatcher.now_s() + request.timeout_s
        self._avoid: set[str] = set()
        self._num_losses = 0
        self._num_sent = 0
        self._connection: ReplicaConnection | None = None
        self._request_id = ""
        self._inbox = Inbox()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    async def deltas(self, interval_s: Interval = lambda: 0.0) -> AsyncGenerator[tuple[Delta, ...], None]:
        """Yields text as it comes; what has piled up of a choice comes as one without tokens_per_delta.

        interval_s: gives the least time between this piece and the next; the first and the last come at once.
        Raises TriadError if it breaks off.
        """
        clock = asyncio.get_running_loop().time
        due_s = 0.0
        while self.finished is None:
            piled: dict[int, list[Delta]] = {}
            end: Finished | Failed | None = None
            for event in await self._inbox.take(due_s):
                if isinstance(event, Delta):
                    piled.setdefault(event.index, []).append(event)
                    self.num_tokens += event.num_tokens
                    if event.reason is not None:
                        self.finish_reasons[event.index] = event.reason
                else:
                    end = event
            if piled:
                due_s = clock() + interval_s()
                if self._request.tokens_per_delta is None:
                    yield tuple(map(joined, piled.values()))
                else:
                    yield tuple(chain.from_iterable(piled.values()))
            if isinstance(end, Failed):
                self.last = end
                raise TriadError(end.code, end.message)
            if end is not None:
                self.last = self.finished = end
                self._dispatcher.ended(self._request, end)

    async def whole(self) -> tuple[Delta, ...]:
        """Returns every choice as one, in order; a lost replica is survived, for nothing is sent before."""
        while True:
            try:
                parts: dict[int, list[Delta]] = {}
                async for deltas in self.deltas(lambda: math.inf):
                    for delta in deltas:
                        parts.setdefault(delta.index, []).append(delta)
                return tuple(joined(parts[index]) for index in sorted(parts))
            except TriadError as error:
                if not self._may_retry(error):
                    raise
                await self._start()

    async def _start(self) -> None:
        """Sends the request until a replica answers with a first event."""
        self.num_tokens = 0
        self.finish_reasons.clear()
        while True:
            try:
                await self._send()
                first = await self._inbox.first()
                if not isinstance(first, Failed):
                    return
                self.last = first
                raise TriadError(first.code, first.message)
            except TriadError as error:
                if not self._may_retry(error):
                    raise

    async def _send(self) -> None:
        # A new id each time: the replica that was lost may still know the old one.
        self._num_sent += 1
        self._connection, self._request_id = None, f"{self._request.request_id}.{self._num_sent}"
        request = replace(self._request, request_id=self._request_id, timeout_s=self._time_left())
        self._connection, self.accepted, self._inbox = await self._dispatcher.place(
            request, self._avoid, is_admitted=self._num_losses > 0
        )

    def _time_left(self) -> float | None:
        if self._deadline_s is None:
            return None
        left_s = self._deadline_s - self._dispatcher.now_s()
        if left_s <= 0:
            raise TriadError(ErrorCode.DEADLINE_EXCEEDED, "The request's time was up.", "timeout_s")
        return left_s

    def _may_retry(self, error: TriadError) -> bool:
        """True, and the loss counted, if the failure is the replica's and the request may go to another."""
        # Where none would take it, there was no failure.
        was_tried = (
            isinstance(error, ReplicaLost) or error.code is ErrorCode.INTERNAL or self._connection is not None
        )
        if not was_tried or error.code not in FAULTS or self._num_losses == MAX_LOSSES:
            return False
        if self._connection is not None:
            self._avoid.add(self._connection.replica_id)
        if not self._dispatcher.can_retry(self._avoid):
            return False
        self._num_losses += 1
        if isinstance(self.last, Failed):
            self.given_up.append((self.last, self.num_tokens))
            self.last = None
        return True

    def _leave(self) -> None:
        if self._connection is None:
            return
        if self.last is None:
            for event in self._inbox.take_now():
                if isinstance(event, Delta):
                    self.num_tokens += event.num_tokens
                else:
                    self.last = event
        if self.last is None:
            self._connection.abandon(self._request_id, self.on_end)
        else:
            self.on_end(self.last)
