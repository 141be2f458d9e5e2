"""One model server without Ray: requests in, events out on channels, the engine on a thread of its own.

Belongs to the event loop that `start` ran on, but for methods that say otherwise. Whatever touches the engine
or its requests' records (replicas.requests) is a command to the engine's thread (replicas.engine_thread).
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from policies.cost import ReplicaCosts
from policies.failures import Failures
from policies.modes import DecodePlan
from policies.policy import Trial
from policies.replica_load import ReplicaLoad
from replicas.channels import Channel, ChannelHub
from replicas.engine.engine import Engine
from replicas.engine_thread import EngineThread
from replicas.errors import ErrorCode, TriadError
from replicas.messages import Accepted, GenerateRequest, Rejected
from replicas.preparation import Preparation
from replicas.requests import RequestTable
from replicas.stats import LoadMeter
from replicas.text import TextCodec
from replicas.timeline import Timeline
from replicas.token_messages import Refused, TokenAnswer, TokenRequest


class ReplicaService:
    """Serves one model.

    clock: seconds, monotonic; the engine's.
    costs: as first measured and known, and then learned on; None publishes none.
    on_timeline: called on the event loop with the timeline of each choice that has ended; None keeps none.
    """

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        replica_id: str,
        clock: Callable[[], float] = time.monotonic,
        costs: ReplicaCosts | None = None,
        on_timeline: Callable[[Timeline], None] | None = None,
    ):
        self.replica_id = replica_id
        self._engine = engine
        self._on_timeline = on_timeline
        self._timeline_failures = Failures("handing a timeline over")
        self._meter = LoadMeter(engine, clock, costs)
        grammars = codec.grammars(engine.spec.vocab_size, engine.spec.eos_token_ids)
        self._preparation = Preparation(codec, grammars, engine.spec.max_context, engine.capacity)
        self._hub = ChannelHub(self._cancel_channel)
        hand_over = None if on_timeline is None else self._hand_over
        self._requests = RequestTable(
            engine, codec, replica_id, clock, self._hub.is_open, self._hub.publish, hand_over
        )
        self._thread = EngineThread(engine, replica_id, clock, self._requests.publish, self._on_death)

    def start(self) -> None:
        """Starts the service. Must be called on the event loop that will serve the channels."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._preparation.start()

    async def stop(self) -> None:
        """Ends what is running with UNAVAILABLE, then the thread and the channels."""
        self._preparation.close()
        requests, message = self._requests, "the replica is shutting down"
        await self._thread.stop(lambda: requests.end(requests.request_ids, ErrorCode.UNAVAILABLE, message))
        self._hub.close()

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        """Queues a request. Its events, from here on, go to its channel and end with exactly one last."""
        if not self._hub.is_open(request.channel_id):
            message = f"no channel {request.channel_id!r} is open to this replica"
            return Rejected(request.request_id, ErrorCode.UNAVAILABLE, message)
        try:
            request = self._preparation.fitted(request)
            prepared = await self._preparation.prepare(request)
            await self._thread.call(lambda: self._requests.submit(request, prepared))
        except TriadError as error:
            return Rejected(request.request_id, error.code, error.message, error.param)
        told = tuple(map(tuple, prepared.prompts)) if request.return_token_ids else ()
        num_tokens = sum(map(len, prepared.prompts))
        return Accepted(request.request_id, num_tokens, told, prepared.warning)

    async def tokens(self, request: TokenRequest) -> TokenAnswer:
        """Tokenizes or detokenizes, beside the engine."""
        try:
            return await self._preparation.tokens(request)
        except TriadError as error:
            return Refused(error.code, error.message, error.param)

    async def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests with CANCELLED, pages and all; those that have ended already stay as they are."""
        ids = tuple(request_ids)
        self._preparation.drop(ids)
        # Shielded: a caller that goes meanwhile wants the requests gone all the same.
        await asyncio.shield(self._thread.call(lambda: self._requests.cancel(ids)))

    def open_channel(self, channel_id: str, channel: Channel) -> None:
        """Opens the way of the events of requests with this channel id; one that had it ends."""
        self._hub.open(channel_id, channel)

    def leave_channel(self, channel_id: str, channel: Channel) -> None:
        """Says that nobody takes what a channel sends; its requests end."""
        self._hub.left(channel_id, channel)

    def set_plan(self, decode: DecodePlan, rule: str) -> None:
        """Sets the plan of `auto` requests from their next safe point on. From any thread; does not wait."""
        self._thread.put(lambda: self._engine.set_plan(decode, rule))

    def set_trial(self, trial: Trial | None) -> None:
        """Sets the trial that `auto` requests make next. From any thread; does not wait."""
        self._thread.put(lambda: self._engine.set_trial(trial))

    @property
    def costs(self) -> ReplicaCosts | None:
        """The costs as last published. May be read from any thread."""
        return self._meter.costs

    def snapshot(self) -> ReplicaLoad:
        """The load after the last step or command, with recent rates. Does not wait for the engine.

        Tells the engine what its forwards have come to cost. An engine that has died is silent from then on.
        """
        load = self._meter.measure(self._thread.snapshot, self._thread.silent_s)
        if load.costs is not None:
            step_cost = load.costs.step
            self._thread.put(lambda: self._engine.set_step_cost(step_cost))
        return load

    async def state(self) -> dict[str, Any]:
        """The plan under way and what runs, for people to read."""
        return await self._thread.state()

    def check(self) -> None:
        """Raises RuntimeError when the engine's thread has died or a forward hangs. From any thread."""
        self._thread.check()

    def _cancel_channel(self, channel_id: str) -> None:
        self._preparation.drop_channel(channel_id)
        self._thread.put(lambda: self._requests.cancel_channel(channel_id))

    def _tell_timeline(self, timeline: Timeline) -> None:
        assert self._on_timeline is not None
        with self._timeline_failures:
            self._on_timeline(timeline)

    # The engine's thread calls these.

    def _hand_over(self, timeline: Timeline) -> None:
        self._loop.call_soon_threadsafe(self._tell_timeline, timeline)

    def _on_death(self) -> None:
        """Ends every request and then the channels, by which the routers know."""
        try:
            self._requests.end_all_of_dead_engine()
        finally:
            self._loop.call_soon_threadsafe(self._hub.close)
