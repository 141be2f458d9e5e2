"""One replica as this router sees it: the channel, kept open, and the requests on it."""

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from policies.placement import OwnTraffic
from replicas.errors import ErrorCode, TriadError
from replicas.messages import Accepted, Delta, Event, Failed, GenerateRequest, ModelInfo, Rejected
from router.transport import ReplicaClient

logger = logging.getLogger(__name__)

Inbox = asyncio.Queue[Event]
"""One request's events, in order, ending with exactly one Finished or Failed."""


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """silence_s: a channel without an item for this long counts as broken; keep-alives come every second.

    call_s: for a submit or a cancel. reopen_s, max_reopen_s: first and longest wait before a broken
    channel is opened again, doubling in between.
    """

    silence_s: float = 15.0
    call_s: float = 10.0
    reopen_s: float = 0.1
    max_reopen_s: float = 2.0


class Link:
    """Lives on one event loop; run() keeps it alive.

    leaving: the replica takes no more requests (it drains or is gone); the channel closes with the
    last one on it. on_break: called each time the channel broke.
    """

    def __init__(
        self, client: ReplicaClient, traffic: OwnTraffic, times: LinkTimes, on_break: Callable[[], None]
    ):
        self._client = client
        self._traffic = traffic
        self._times = times
        self._on_break = on_break
        self._channel_id: str | None = None
        self._inboxes: dict[str, Inbox] = {}
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
        """A request may be submitted."""
        return self._channel_id is not None and not self.leaving

    @property
    def leaving(self) -> bool:
        return self._leaving.is_set()

    @leaving.setter
    def leaving(self, leaving: bool) -> None:
        self._leaving.set() if leaving else self._leaving.clear()

    @property
    def num_in_flight(self) -> int:
        return len(self._inboxes)

    async def submit(
        self, request: GenerateRequest, now_s: float, num_prompt_tokens: int = 0
    ) -> tuple[Accepted, Inbox]:
        """Sends a request and returns the replica's word, and where its events come in.

        Raises TriadError with the replica's reason when it refuses, or UNAVAILABLE when it can't be
        reached; then there are no events. now_s: by the clock of OwnTraffic; num_prompt_tokens:
        an estimate.
        """
        if self._channel_id is None:
            raise TriadError(ErrorCode.UNAVAILABLE, f"Replica {self.replica_id} can't be reached.")
        request = replace(request, channel_id=self._channel_id)
        # Events may overtake the reply, so the inbox is there before the request goes out.
        inbox: Inbox = asyncio.Queue()
        self._inboxes[request.request_id] = inbox
        self._traffic.started(self.replica_id, now_s, num_prompt_tokens)
        try:
            async with asyncio.timeout(self._times.call_s):
                reply = await self._client.submit(request)
        except BaseException as error:
            # The replica may have taken the request all the same.
            self.abandon(request.request_id)
            if not isinstance(error, Exception):
                raise
            logger.warning("replica %s: submit failed: %r", self.replica_id, error)
            message = f"Replica {self.replica_id} could not be reached."
            raise TriadError(ErrorCode.UNAVAILABLE, message) from error
        if isinstance(reply, Rejected):
            self._forget(request.request_id)
            raise TriadError(reply.code, reply.message, reply.param)
        return reply, inbox

    def abandon(self, request_id: str) -> None:
        """Nobody waits for this request any more: it is cancelled at the replica, unless it has ended."""
        if self._forget(request_id) is not None:
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
        try:
            async with (
                asyncio.timeout(self._times.silence_s) as deadline,
                aclosing(self._client.channel(channel_id)) as stream,
            ):
                async for events in stream:
                    deadline.reschedule(asyncio.get_running_loop().time() + self._times.silence_s)
                    self._channel_id = channel_id
                    for event in events:
                        self._hand_over(event)
                    if self.leaving and not self._inboxes:
                        return True
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            opened = self._channel_id is not None
            self._channel_id = None
            self._fail_all()
        logger.warning("replica %s: %s", self.replica_id, reason.partition("\n")[0])
        self._on_break()
        return opened

    def _hand_over(self, event: Event) -> None:
        if isinstance(event, Delta):
            inbox = self._inboxes.get(event.request_id)
            if inbox is None:
                # Its submit was given up in mid-call, and the cancel came before it.
                self._cancel(event.request_id)
                return
        else:
            inbox = self._forget(event.request_id)
        if inbox is not None:
            inbox.put_nowait(event)

    def _fail_all(self) -> None:
        for request_id in tuple(self._inboxes):
            message = f"Replica {self.replica_id} was lost."
            self._hand_over(Failed(request_id, ErrorCode.UNAVAILABLE, message))

    def _forget(self, request_id: str) -> Inbox | None:
        inbox = self._inboxes.pop(request_id, None)
        if inbox is not None:
            self._traffic.ended(self.replica_id)
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
