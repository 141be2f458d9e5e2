"""One replica as this router sees it: the channel, kept open, and the requests on it."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from policies.control.loop import Clock
from replicas.errors import ErrorCode, TriadError
from replicas.messages import Accepted, Delta, Event, Failed, Finished, GenerateRequest, ModelInfo, Rejected
from replicas.token_messages import Refused, TokenAnswer, Tokenized, TokenRequest
from replicas.wire import CallError
from router.ejection import FailureWatch
from router.inbox import Inbox
from router.placement import OwnTraffic, Sent

logger = logging.getLogger(__name__)

LastWord = Callable[[Finished | Failed | None], None]
"""A function told once how an abandoned request ended; None where its replica was lost before it said."""

OnEvents = Callable[[tuple[Event, ...]], bool]
"""A function that takes events as they come, and returns False where the channel is to be closed."""

FAULTS = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.INTERNAL})
"""Errors that are the replica's and not the request's, which another replica may not have."""


class ReplicaClient(Protocol):
    """One replica. Any call may raise whatever the transport raises when the replica is gone, and CallError,
    having sent nothing, for what can't be sent to any."""

    @property
    def info(self) -> ModelInfo: ...

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected: ...

    async def cancel(self, request_ids: tuple[str, ...]) -> None: ...

    async def tokens(self, request: TokenRequest) -> TokenAnswer: ...

    async def hold_channel(self, channel_id: str, on_events: OnEvents) -> None:
        """Opens a channel, and gives on_events the events of all requests submitted with this channel id; an
        empty item when it opens and about every second. Returns once it has closed, which ends those requests
        at the replica."""
        ...


@dataclass(frozen=True, slots=True)
class Roster:
    """The replicas running now."""

    clients: Sequence[ReplicaClient]
    complete: bool = True
    """False if some did not answer, so that one missing here may be alive."""


class Directory(Protocol):
    """The source from which a router learns the running replicas."""

    async def roster(self) -> Roster:
        """The replicas running now. May raise whatever the transport raises; then nothing is known."""
        ...


class ReplicaLost(TriadError):
    """A submit broke off: the replica may be gone, and may have taken the request before it went."""

    def __init__(self, replica_id: str):
        super().__init__(ErrorCode.UNAVAILABLE, f"Replica {replica_id} could not be reached.")


@dataclass(frozen=True, slots=True)
class ConnectionTimes:
    """Times of a replica's channel and calls."""

    silence_s: float = 15.0
    """A channel without an item for this long, or a sixteenth less, counts as broken; keep-alives come every
    second."""
    call_s: float = 10.0
    """The time for a submit or a cancel."""
    reopen_s: float = 0.1
    """The first wait before a broken channel is opened again, doubling from then on."""
    max_reopen_s: float = 2.0
    """The longest such wait."""


class ReplicaConnection:
    """The channel to one replica, on one event loop; run() keeps it open.

    watch: told of each request that the replica fails, and of each that ends well
    on_break: called each time the channel broke
    clock: the clock of traffic and watch
    """

    def __init__(
        self,
        client: ReplicaClient,
        traffic: OwnTraffic,
        watch: FailureWatch,
        times: ConnectionTimes,
        on_break: Callable[[], None],
        clock: Clock,
    ):
        self._client = client
        self._traffic = traffic
        self._watch = watch
        self._times = times
        self._on_break = on_break
        self._clock = clock
        self._channel_id: str | None = None
        self._inboxes: dict[str, tuple[Inbox, Sent]] = {}
        self._last_words: dict[str, LastWord] = {}
        self._to_cancel: set[str] = set()
        self._cancel_wanted = asyncio.Event()
        self._leaving = asyncio.Event()

    @property
    def info(self) -> ModelInfo:
        return self._client.info

    @property
    def replica_id(self) -> str:
        return self._client.info.replica_id

    @property
    def is_open(self) -> bool:
        """True if a request may be submitted."""
        return self._channel_id is not None and not self.leaving

    @property
    def leaving(self) -> bool:
        """True if the replica takes no more requests (it drains or is gone): the channel closes with the
        last one on it."""
        return self._leaving.is_set()

    @leaving.setter
    def leaving(self, leaving: bool) -> None:
        self._leaving.set() if leaving else self._leaving.clear()

    @property
    def num_in_flight(self) -> int:
        return len(self._inboxes)

    async def submit(
        self, request: GenerateRequest, num_prompt_tokens: int = 0, is_sure: bool = True
    ) -> tuple[Accepted, Inbox]:
        """Sends a request and returns the replica's word, and where its events come in.

        num_prompt_tokens: an estimate
        is_sure: by it the prompt fits; one that may not takes no place from others before it is accepted

        Raises TriadError with the replica's reason when it refuses, or for what can't be sent to any,
        ReplicaLost when that can't be known; then there are no events.
        """
        if self._channel_id is None:
            raise TriadError(ErrorCode.UNAVAILABLE, f"Replica {self.replica_id} can't be reached.")
        request = replace(request, channel_id=self._channel_id)
        # Events may overtake the reply, so the inbox is there before the request goes out.
        inbox = Inbox()
        counted = (num_prompt_tokens, request.num_indices) if is_sure else (0, 0)
        sent = self._traffic.started(self.replica_id, self._clock(), *counted)
        self._inboxes[request.request_id] = inbox, sent
        try:
            async with asyncio.timeout(self._times.call_s):
                reply = await self._client.submit(request)
        except CallError as error:
            self._forget(request.request_id)
            raise _unsendable(error) from error
        except BaseException as error:
            # The replica may have taken the request all the same.
            self.abandon(request.request_id)
            if not isinstance(error, Exception):
                raise
            logger.warning("replica %s: submit failed: %r", self.replica_id, error)
            self._watch.failed(self.replica_id, self._clock())
            raise ReplicaLost(self.replica_id) from error
        if isinstance(reply, Rejected):
            self._forget(request.request_id)
            if reply.code in FAULTS:
                self._watch.failed(self.replica_id, self._clock())
            raise TriadError(reply.code, reply.message, reply.param)
        self._traffic.accepted(sent, reply.num_prompt_tokens, request.num_indices)
        return reply, inbox

    async def tokens(self, request: TokenRequest) -> Tokenized | str:
        """Has the replica tokenize or detokenize. Raises TriadError, ReplicaLost where no answer comes."""
        try:
            async with asyncio.timeout(self._times.call_s):
                reply = await self._client.tokens(request)
        except CallError as error:
            raise _unsendable(error) from error
        except Exception as error:
            logger.warning("replica %s: tokens failed: %r", self.replica_id, error)
            raise ReplicaLost(self.replica_id) from error
        if isinstance(reply, Refused):
            raise TriadError(reply.code, reply.message, reply.param)
        return reply

    def abandon(self, request_id: str, last_word: LastWord | None = None) -> None:
        """Cancels at the replica a request that nobody waits for any more, unless it has ended."""
        if self._forget(request_id) is not None:
            if last_word is not None:
                self._last_words[request_id] = last_word
            self._cancel(request_id)

    async def run(self) -> None:
        """Keeps the channel open until the replica has left; never raises but when it is cancelled."""
        canceller = asyncio.create_task(self._send_cancels())
        wait_s = self._times.reopen_s
        try:
            while True:
                opened = await self._hold_channel()
                if self.leaving:
                    return
                wait_s = self._times.reopen_s if opened else min(2 * wait_s, self._times.max_reopen_s)
                try:
                    async with asyncio.timeout(wait_s):
                        await self._leaving.wait()
                except TimeoutError:
                    continue
                return
        finally:
            canceller.cancel()

    async def _hold_channel(self) -> bool:
        """Opens the channel and hands its events out until it ends. Returns whether it ever opened."""
        channel_id = uuid.uuid4().hex
        reason = "its channel ended"
        loop, silence_s, reschedule_s = asyncio.get_running_loop(), self._times.silence_s, 0.0

        def take(events: tuple[Event, ...]) -> bool:
            nonlocal reschedule_s
            now_s = loop.time()
            if now_s >= reschedule_s:  # a timer for each item would cost as much as all the rest
                if deadline.expired():
                    return False
                deadline.reschedule(now_s + silence_s)
                reschedule_s = now_s + silence_s / 16
            self._channel_id = channel_id
            for event in events:
                self._hand_over(event)
            return bool(self._inboxes) or not self.leaving

        try:
            async with asyncio.timeout(silence_s) as deadline:
                await self._client.hold_channel(channel_id, take)
            if self.leaving and not self._inboxes:
                return True
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            opened = self._channel_id is not None
            self._channel_id = None
            if self._inboxes and not self.leaving:
                self._watch.failed(self.replica_id, self._clock())
            self._fail_all()
        logger.warning("replica %s: %s", self.replica_id, reason.partition("\n")[0])
        self._on_break()
        return opened

    def _hand_over(self, event: Event) -> None:
        if isinstance(event, Delta):
            entry = self._inboxes.get(event.request_id)
            if entry is None:
                # Its submit was given up in mid-call, and the cancel came before it.
                self._cancel(event.request_id)
            else:
                inbox, sent = entry
                self._traffic.begun(sent)
                inbox.put(event)
            return
        last_word = self._last_words.pop(event.request_id, None)
        if last_word is not None:
            last_word(event)
        ended = self._forget(event.request_id)
        if ended is None:
            return
        ended.put(event)
        if isinstance(event, Finished):
            self._watch.succeeded(self.replica_id)
        elif event.code in FAULTS:
            self._watch.failed(self.replica_id, self._clock())

    def _fail_all(self) -> None:
        """Fails every request on a lost channel, which is one failure, however many they were."""
        message = f"Replica {self.replica_id} was lost."
        for request_id in tuple(self._inboxes):
            inbox = self._forget(request_id)
            if inbox is not None:
                inbox.put(Failed(request_id, ErrorCode.UNAVAILABLE, message))
        last_words, self._last_words = self._last_words, {}
        for last_word in last_words.values():
            last_word(None)

    def _forget(self, request_id: str) -> Inbox | None:
        entry = self._inboxes.pop(request_id, None)
        if entry is None:
            return None
        inbox, sent = entry
        self._traffic.ended(sent, self._clock())
        return inbox

    def _cancel(self, request_id: str) -> None:
        self._to_cancel.add(request_id)
        self._cancel_wanted.set()

    async def _send_cancels(self) -> None:
        """Cancels what was abandoned, all that waits in one call. With the channel gone it is moot: the
        replica cancels what was on it."""
        while True:
            await self._cancel_wanted.wait()
            self._cancel_wanted.clear()
            request_ids = tuple(self._to_cancel)
            self._to_cancel.clear()
            try:
                async with asyncio.timeout(self._times.call_s):
                    await self._client.cancel(request_ids)
            except Exception as error:
                logger.warning("replica %s: cancel failed: %r", self.replica_id, error)


def _unsendable(error: CallError) -> TriadError:
    """What no replica can be sent is the request's fault alone, to be neither retried nor counted."""
    logger.warning("%s", error)
    return TriadError(ErrorCode.INVALID_REQUEST, "The request can't be sent to a replica.")
