"""Sends each request to a replica and brings its events back, whatever happens to the replica."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from policies.control.loop import Clock
from replicas.errors import ErrorCode, TriadError
from replicas.messages import (
    Accepted,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    joined,
)
from router.admission_control import Admission, AdmissionControl, Shed
from router.ejection import FailureWatch
from router.errors import Overloaded, raise_if_shed
from router.load_view import LoadView
from router.placement import place
from router.prompt_estimator import PromptEstimator, check_fits
from router.replica_connection import (
    FAULTS,
    Directory,
    Inbox,
    LastWord,
    LinkTimes,
    ReplicaConnection,
    ReplicaLost,
)

logger = logging.getLogger(__name__)

DISCOVERY_PERIOD_S = 1.0
MAX_LOSSES = 1
"""The failures of its replicas that a request survives, as long as nothing of it has been sent: so one that
itself brings a replica down brings down two at most."""
MAX_UNSURE = 16
"""Prompts that by the estimate don't fit, sent off by this router and not yet read by a replica, for each
replica that can be reached: reading them takes time from the others."""

_ELSEWHERE = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.QUEUE_FULL})
"""Refusals for which another replica may have a better answer."""


class Dispatcher:
    """Sends requests to replicas, on one event loop; run() finds the replicas and keeps a link to each.

    directory: the replicas that run. view: their load. Requests go out by `generate`.
    """

    def __init__(
        self,
        directory: Directory,
        view: LoadView,
        admission: AdmissionControl,
        *,
        times: LinkTimes | None = None,
        discovery_period_s: float = DISCOVERY_PERIOD_S,
        rng: random.Random | None = None,
        clock: Clock = time.monotonic,
    ):
        self._directory = directory
        self._view = view
        self._admission = admission
        self._times = times or LinkTimes()
        self._discovery_period_s = discovery_period_s
        self._rng = rng or random.Random()
        self._clock = clock
        self._traffic = admission.traffic
        self._watch = FailureWatch()
        self._wishes = PromptEstimator()
        self._num_unsure = 0
        self._links: dict[str, ReplicaConnection] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._look_again = asyncio.Event()
        self._model: ModelInfo | None = None
        self._draining = False

    @property
    def ready(self) -> bool:
        """True while a replica can take a request and new ones are wanted."""
        return not self._draining and any(link.is_open for link in self._links.values())

    def drain(self) -> None:
        """Refuses new requests from now on; those that are here go on."""
        self._draining = True

    def check_room(self) -> None:
        """Raises TriadError where no request is taken, whatever it asks: while draining, and while all
        places are taken. `generate` checks again, with the request's size."""
        if self._draining:
            raise TriadError(ErrorCode.UNAVAILABLE, "The server is shutting down.")
        verdict = self._verdict()
        if isinstance(verdict, Shed) and verdict.contended:
            raise_if_shed(verdict)

    @property
    def model(self) -> ModelInfo | None:
        """The model that the replicas serve; None until a replica has been seen."""
        return self._model

    def in_flight(self) -> dict[str, int]:
        """This router's own requests, by replica, however many choices they have."""
        return {replica_id: link.num_in_flight for replica_id, link in sorted(self._links.items())}

    def generate(self, request: GenerateRequest) -> "Generation":
        return Generation(self, request)

    async def run(self) -> None:
        """Keeps a link to each replica that runs, until cancelled; then every request still here fails."""
        try:
            while True:
                self._look_again.clear()
                await self._discover()
                try:
                    async with asyncio.timeout(self._discovery_period_s):
                        await self._look_again.wait()
                except TimeoutError:
                    continue
        finally:
            runs = list(self._runs.values())
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)

    async def place(
        self, request: GenerateRequest, avoid: set[str], is_admitted: bool = False
    ) -> tuple[ReplicaConnection, Accepted, Inbox]:
        """Sends a request to the best replica that takes it. Adds those that refuse or fail to `avoid`.

        is_admitted: it has been let in before, and its replica was lost. Raises TriadError when none takes
        it, ReplicaLost or INTERNAL at the first that fails.
        """
        self._check_size(request)
        lens = self._wishes.prompt_lens(request)
        num_tokens = sum(lens)
        is_sure = self._model is None or max(lens) <= self._model.max_context
        if not is_admitted:
            raise_if_shed(self._verdict(request.num_indices, num_tokens, request.timeout_s))
            if not is_sure and self._num_unsure >= MAX_UNSURE * len(self._open()):
                message = "Too many prompts that may not fit the context are being read; try again in 1 s."
                raise Overloaded(ErrorCode.QUEUE_FULL, message, 1)
        self._num_unsure += not is_sure
        try:
            return await self._send(request, avoid, num_tokens, is_sure)
        finally:
            self._num_unsure -= not is_sure

    async def _send(
        self, request: GenerateRequest, avoid: set[str], num_tokens: int, is_sure: bool
    ) -> tuple[ReplicaConnection, Accepted, Inbox]:
        keys = self._wishes.keys(request)
        refusal: TriadError | None = None
        while True:
            now_s = self._clock()
            usable = self._open(avoid)
            wish = self._wishes.wish(request, keys, num_tokens, now_s)
            chosen = place(usable, self._traffic, self._view.seen, now_s, self._rng, wish)
            if chosen is None:
                raise refusal or TriadError(ErrorCode.UNAVAILABLE, "No other replica can take the request.")
            link = self._links[chosen]
            try:
                accepted, inbox = await link.submit(request, num_tokens, is_sure)
                self._wishes.sent(keys, chosen, now_s)
                return link, accepted, inbox
            except TriadError as error:
                avoid.add(chosen)
                if error.code not in _ELSEWHERE or isinstance(error, ReplicaLost):
                    raise
                refusal = error

    def _check_size(self, request: GenerateRequest) -> None:
        """Raises TriadError where no replica can ever serve so long a prompt, or so many choices."""
        most = self._admission.most_choices
        if request.num_indices > most:
            message = (
                f"this request asks for {request.num_indices} completions, but a replica takes {most} "
                f"at once; lower n, or send fewer prompts a request"
            )
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "n" if request.num_choices > 1 else "prompt")
        if self._model is not None:
            check_fits(request, self._model)

    def can_retry(self, avoid: Collection[str]) -> bool:
        """True if another replica than these can be reached."""
        return bool(self._open(avoid))

    def ended(self, request: GenerateRequest, event: Finished) -> None:
        """Learns the length of tokens from a request that has finished."""
        self._wishes.finished(request, event)

    def now_s(self) -> float:
        return self._clock()

    def _verdict(
        self, num: int = 1, num_prompt_tokens: int = 0, deadline_s: float | None = None
    ) -> Admission:
        replica_ids, now_s = self._open(), self._clock()
        return self._admission.check(
            replica_ids,
            self._view.seen,
            now_s,
            num=num,
            num_prompt_tokens=num_prompt_tokens,
            deadline_s=deadline_s,
        )

    def _open(self, avoid: Collection[str] = ()) -> Sequence[str]:
        """The reachable replicas but those to avoid, and without those that fail all they are sent."""
        links = self._links.items()
        reachable = [replica_id for replica_id, link in links if link.is_open and replica_id not in avoid]
        return self._watch.trusted(reachable, self._clock())

    async def _discover(self) -> None:
        try:
            roster = await self._directory.roster()
        except Exception as error:
            logger.debug("no roster: %r", error)
            return
        found = {client.info.replica_id: client for client in roster.clients}
        for replica_id, link in self._links.items():
            if replica_id in found or roster.complete:
                link.leaving = replica_id not in found
        for replica_id, client in found.items():
            self._model = client.info
            if replica_id not in self._links:
                link = ReplicaConnection(
                    client, self._traffic, self._watch, self._times, self._look_again.set, self._clock
                )
                self._links[replica_id] = link
                run = self._runs[replica_id] = asyncio.create_task(link.run())
                run.add_done_callback(lambda _, gone=replica_id: self._drop(gone))  # type: ignore[misc]

    def _drop(self, replica_id: str) -> None:
        del self._links[replica_id]
        del self._runs[replica_id]
        self._traffic.forget(replica_id)
        self._watch.forget(replica_id)
        self._wishes.forget(replica_id)


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
        """Tokens of all choices, as far as their events have come."""
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
        self._link: ReplicaConnection | None = None
        self._request_id = ""
        self._inbox: Inbox = asyncio.Queue()
        self._first: Event | None = None

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

    async def deltas(self, interval_s: float = 0.0) -> AsyncGenerator[tuple[Delta, ...], None]:
        """Yields text as it comes; what has piled up of a choice comes as one without tokens_per_delta.

        interval_s: the least time between two pieces; the first and the last come at once.
        Raises TriadError if it breaks off.
        """
        clock = asyncio.get_running_loop().time
        due_s = 0.0
        while self.finished is None:
            piled: dict[int, list[Delta]] = {}
            event: Event | None = self._first or await self._inbox.get()
            self._first = None
            while isinstance(event, Delta):
                piled.setdefault(event.index, []).append(event)
                self.num_tokens += event.num_tokens
                if event.reason is not None:
                    self.finish_reasons[event.index] = event.reason
                event = await self._next_before(due_s)
            if piled:
                due_s = clock() + interval_s
                is_joined = self._request.tokens_per_delta is None
                parts = ((joined(part),) if is_joined else part for part in piled.values())
                yield tuple(delta for part in parts for delta in part)
            if isinstance(event, Failed):
                self.last = event
                raise TriadError(event.code, event.message)
            if isinstance(event, Finished):
                self.last = self.finished = event
                self._dispatcher.ended(self._request, event)

    async def _next_before(self, due_s: float) -> Event | None:
        """The next event; None when none has come by due_s, a time of the loop's clock."""
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        if asyncio.get_running_loop().time() >= due_s:
            return None
        try:
            async with asyncio.timeout_at(due_s):
                return await self._inbox.get()
        except TimeoutError:
            return None

    async def whole(self) -> tuple[Delta, ...]:
        """Returns every choice as one, in order; a lost replica is survived, for nothing is sent before."""
        while True:
            try:
                parts: dict[int, list[Delta]] = {}
                async for deltas in self.deltas():
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
                first = await self._inbox.get()
                if not isinstance(first, Failed):
                    self._first = first
                    return
                self.last = first
                raise TriadError(first.code, first.message)
            except TriadError as error:
                if not self._may_retry(error):
                    raise

    async def _send(self) -> None:
        # A new id each time: the replica that was lost may still know the old one.
        self._num_sent += 1
        self._link, self._request_id = None, f"{self._request.request_id}.{self._num_sent}"
        request = replace(self._request, request_id=self._request_id, timeout_s=self._time_left())
        self._link, self.accepted, self._inbox = await self._dispatcher.place(
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
            isinstance(error, ReplicaLost) or error.code is ErrorCode.INTERNAL or self._link is not None
        )
        if not was_tried or error.code not in FAULTS or self._num_losses == MAX_LOSSES:
            return False
        if self._link is not None:
            self._avoid.add(self._link.replica_id)
        if not self._dispatcher.can_retry(self._avoid):
            return False
        self._num_losses += 1
        if isinstance(self.last, Failed):
            self.given_up.append((self.last, self.num_tokens))
            self.last = None
        return True

    def _leave(self) -> None:
        if self._link is None:
            return
        while self.last is None and (self._first is not None or not self._inbox.empty()):
            event, self._first = self._first or self._inbox.get_nowait(), None
            if isinstance(event, Delta):
                self.num_tokens += event.num_tokens
            else:
                self.last = event
        if self.last is None:
            self._link.abandon(self._request_id, self.on_end)
        else:
            self.on_end(self.last)
