"""One model server without Ray: the engine on its own thread, text at its edge, events on channels."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from policies.load import ReplicaLoad
from policies.modes import DecodePlan, Mode
from replicas.channels import ChannelHub
from replicas.engine.engine import Engine
from replicas.engine.sequence import Progress, Sequence
from replicas.errors import ErrorCode, TriadError
from replicas.messages import (
    Accepted,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Rejected,
    TextLogprob,
)
from replicas.stats import DecodingStats
from replicas.text import TextCodec, TextStream
from replicas.timeline import Timeline

logger = logging.getLogger(__name__)
T = TypeVar("T")

WEDGED_S = 120.0
"""A forward that takes longer than this counts as hung."""


@dataclass(slots=True)
class _Live:
    """An accepted request that has not ended."""

    request: GenerateRequest
    text: TextStream
    num_unsent: int = 0
    """Tokens whose text is still held back."""
    unsent_logprobs: list[TextLogprob] = field(default_factory=list)
    timeline: Timeline | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """The engine's load and totals at one moment, for other threads to read."""

    load: ReplicaLoad
    num_tokens: int
    tokens_by_mode: Mapping[Mode, int]
    forwards_by_mode: Mapping[Mode, int]


@dataclass(slots=True)
class _Outbox:
    """A step's events, by channel."""

    events: dict[str, list[Event]] = field(default_factory=dict)

    def add(self, channel_id: str, event: Event) -> None:
        self.events.setdefault(channel_id, []).append(event)


class ReplicaService:
    """Everything that touches the engine runs on one thread, as commands between two steps.

    The coroutines belong to the event loop that start() ran on. clock: seconds, monotonic; the engine's.
    on_timeline: called on the event loop with the timeline of each request that has ended; None, and
    none is kept.
    """

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        replica_id: str,
        clock: Callable[[], float] = time.monotonic,
        on_timeline: Callable[[Timeline], None] | None = None,
    ):
        self._on_timeline = on_timeline
        self.replica_id = replica_id
        self._engine = engine
        self._codec = codec
        self._clock = clock
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[str, _Live] = {}
        self._stats = DecodingStats(clock)
        self._seen = self._look()
        self._hub = ChannelHub(self._cancel_channel)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._step_began_s: float | None = None
        self._death: BaseException | None = None
        self._stopping = False

    def start(self) -> None:
        """Must be called on the event loop that will serve the channels."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends what is running with UNAVAILABLE, then the thread and the channels."""
        self._stopping = True
        message = "the replica is shutting down"
        self._commands.put(lambda: self._end(tuple(self._live), ErrorCode.UNAVAILABLE, message))
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._hub.close()

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        """Queues a request. Its events, from here on, go to its channel and end with exactly one last."""
        if not self._hub.is_open(request.channel_id):
            message = f"no channel {request.channel_id!r} is open to this replica"
            return Rejected(request.request_id, ErrorCode.UNAVAILABLE, message)
        try:
            prompt_ids = self._codec.encode(request.prompt)
            await self._call(lambda: self._submit(request, prompt_ids))
        except TriadError as error:
            return Rejected(request.request_id, error.code, error.message, error.param)
        return Accepted(request.request_id, len(prompt_ids))

    async def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests with CANCELLED, pages and all; those that have ended already stay as they are."""
        ids = tuple(request_ids)
        await self._call(lambda: self._cancel(ids))

    def channel(self, channel_id: str) -> AsyncIterator[tuple[Event, ...]]:
        return self._hub.stream(channel_id)

    def set_plan(self, decode: DecodePlan, rule: str) -> None:
        """What `auto` requests do from their next safe point on. From any thread; does not wait."""
        self._commands.put(lambda: self._engine.set_plan(decode, rule))

    def load(self) -> ReplicaLoad:
        """The load after the last step or command, with recent rates. Does not wait for the engine."""
        seen = self._seen
        self._stats.update(seen.num_tokens, seen.tokens_by_mode, seen.forwards_by_mode)
        return replace(
            seen.load,
            tokens_per_s=self._stats.tokens_per_s,
            tokens_per_forward=dict(self._stats.tokens_per_forward),
        )

    async def state(self) -> dict[str, Any]:
        """For people: the plan under way and what runs."""
        return await self._call(self._state)

    def check(self) -> None:
        """Raises RuntimeError when the engine's thread has died or a forward hangs."""
        if self._death is not None:
            raise RuntimeError(f"the engine's thread died: {self._death!r}")
        began_s = self._step_began_s
        if began_s is not None and self._clock() - began_s > WEDGED_S:
            raise RuntimeError(f"a forward has been running for more than {WEDGED_S:g} s")

    async def _call(self, command: Callable[[], T]) -> T:
        """Runs a command on the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                if self._death is not None:
                    raise TriadError(ErrorCode.UNAVAILABLE, "the replica's engine has failed")
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        if self._stopping:
            raise TriadError(ErrorCode.UNAVAILABLE, "the replica is shutting down")
        self._commands.put(run)
        return await asyncio.wrap_future(future)

    # The rest runs on the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                self._step_began_s = self._clock()
                progress = self._engine.step()
                self._step_began_s = None
                self._publish(progress)
                self._seen = self._look()
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._death = error
            for live in self._live.values():
                self._close(live, None, ErrorCode.INTERNAL)
            self._send_failure(self._live.values(), ErrorCode.INTERNAL, "the replica's engine failed")
            while (command := self._commands.get()) is not None:
                command()

    def _obey(self) -> bool:
        """Runs the commands that wait; blocks for one when there is no work. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self._seen = self._look()

    def _submit(self, request: GenerateRequest, prompt_ids: list[int]) -> None:
        self._engine.submit(
            request.request_id, prompt_ids, request.sampling, request.decoding, request.timeout_s
        )
        live = self._live[request.request_id] = _Live(request, self._codec.stream(request.sampling.stop))
        if self._on_timeline is not None:
            live.timeline = Timeline(request.request_id, request.traceparent, self._clock())

    def _cancel(self, request_ids: Iterable[str]) -> None:
        self._end(request_ids, ErrorCode.CANCELLED, "the request was cancelled")

    def _end(self, request_ids: Iterable[str], code: ErrorCode, message: str) -> None:
        ended = []
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            if live is not None:
                self._close(live, self._engine.cancel(request_id), code)
                ended.append(live)
        self._send_failure(ended, code, message)

    def _send_failure(self, ended: Iterable[_Live], code: ErrorCode, message: str) -> None:
        outbox = _Outbox()
        for live in ended:
            request = live.request
            outbox.add(request.channel_id, Failed(request.request_id, code, message))
        self._send(outbox)

    def _cancel_channel(self, channel_id: str) -> None:
        """Called on the event loop."""

        def cancel() -> None:
            if self._death is None:
                self._cancel([r for r, live in self._live.items() if live.request.channel_id == channel_id])

        self._commands.put(cancel)

    def _look(self) -> _Seen:
        scheduler = self._engine.scheduler
        load = self._engine.load(self.replica_id)
        by_mode = dict(scheduler.tokens_by_mode), dict(scheduler.forwards_by_mode)
        return _Seen(load, scheduler.num_tokens, *by_mode)

    def _state(self) -> dict[str, Any]:
        scheduler = self._engine.scheduler
        plan = self._engine.active_plan
        return {
            "replica": self.replica_id,
            "plan": {**asdict(plan.decode), "rule": plan.rule},
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_used": scheduler.pages_used,
            "tokens_by_mode": dict(scheduler.tokens_by_mode),
            "forwards_by_mode": dict(scheduler.forwards_by_mode),
        }

    def _publish(self, progress: list[Progress]) -> None:
        outbox = _Outbox()
        for made in progress:
            live = self._live[made.sequence.request_id]
            self._tell(outbox, live, made)
        self._send(outbox)

    def _tell(self, outbox: _Outbox, live: _Live, made: Progress) -> None:
        """Turns what a step did for one request into its events."""
        request_id, channel_id = live.request.request_id, live.request.channel_id
        before = live.text.num_tokens
        text = live.text.push(made.token_ids)
        num_taken = live.text.num_tokens - before
        live.num_unsent += num_taken
        live.unsent_logprobs += map(self._codec.logprob, made.logprobs[:num_taken])
        if live.timeline is not None and num_taken:
            live.timeline.note(made.sequence, num_taken, self._clock())
        if made.reason is not None:
            text += live.text.finish()
        reason = FinishReason.STOP if live.text.stopped else made.reason
        if text:
            outbox.add(channel_id, Delta(request_id, text, live.num_unsent, tuple(live.unsent_logprobs)))
            live.num_unsent = 0
            live.unsent_logprobs = []
        if made.error is not None:
            last: Event = Failed(request_id, made.error, made.message)
        elif reason is not None:
            sequence = made.sequence
            last = Finished(
                request_id,
                reason,
                sequence.num_prompt_tokens,
                live.text.num_tokens,
                sequence.report(self.replica_id),
                sequence.num_reused,
            )
        else:
            return
        del self._live[request_id]
        self._close(live, made.sequence, made.error)
        self._engine.cancel(request_id)  # a stop string ends a sequence that would go on
        outbox.add(channel_id, last)

    def _close(self, live: _Live, sequence: Sequence | None, error: ErrorCode | None) -> None:
        if live.timeline is not None and self._on_timeline is not None:
            live.timeline.end(sequence, error, self._clock())
            self._loop.call_soon_threadsafe(self._on_timeline, live.timeline)

    def _send(self, outbox: _Outbox) -> None:
        if outbox.events:
            self._loop.call_soon_threadsafe(self._hub.publish, outbox.events)
