"""One model server without Ray: the engine on its own thread, text at its edge, events on channels."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any, TypeVar

from policies.cost import StepCost
from policies.modes import DecodePlan
from policies.policy import ExploredPlans
from policies.replica_load import ReplicaLoad
from replicas.channels import ChannelHub
from replicas.engine.engine import Engine
from replicas.engine.sequence import Progress
from replicas.errors import ErrorCode, TriadError
from replicas.messages import (
    NUM_SEEDS,
    Accepted,
    Delta,
    Event,
    GenerateRequest,
    Rejected,
)
from replicas.net import Net
from replicas.preparation import Preparation, Prepared
from replicas.request_state import ChoiceState, Outbox, RequestState, choice_name, is_chat
from replicas.stats import LoadMeter, look
from replicas.text import TextCodec
from replicas.timeline import Timeline

logger = logging.getLogger(__name__)
T = TypeVar("T")

WEDGED_S = 120.0
"""The time after which a forward counts as hung."""


class ReplicaService:
    """Serves one model. All that touches the engine runs on one thread, as commands between two steps.

    The coroutines belong to the event loop that start() ran on. clock: seconds, monotonic; the engine's.
    step_cost: the cost of forwards as first measured, and then learned on; None publishes no costs.
    on_timeline: called on the event loop with the timeline of each choice that has ended; None keeps none.
    """

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        replica_id: str,
        clock: Callable[[], float] = time.monotonic,
        step_cost: StepCost | None = None,
        on_timeline: Callable[[Timeline], None] | None = None,
    ):
        self._on_timeline = on_timeline
        self.replica_id = replica_id
        self._engine = engine
        self._codec = codec
        self._clock = clock
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[str, RequestState] = {}
        self._choices: dict[str, ChoiceState] = {}  # by their names in the engine
        self._meter = LoadMeter(engine, clock, step_cost)
        self._seen = look(engine, replica_id)
        grammars = codec.grammars(engine.spec.vocab_size, engine.spec.eos_token_ids)
        self._preparation = Preparation(codec, grammars, engine.spec.max_context, engine.capacity)
        self._hub = ChannelHub(self._cancel_channel)
        self._commands_net = Net("a command to the engine")
        self._timelines_net = Net("a timeline")
        self._load_net = Net("looking at the engine's load")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._step_began_s: float | None = None
        self._death: BaseException | None = None
        self._stopping = False

    def start(self) -> None:
        """Starts the service. Must be called on the event loop that will serve the channels."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._preparation.start()

    async def stop(self) -> None:
        """Ends what is running with UNAVAILABLE, then the thread and the channels."""
        self._stopping = True
        self._preparation.close()
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
            prepared = await self._preparation.prepare(request)
            await self._call(lambda: self._submit(request, prepared))
        except TriadError as error:
            return Rejected(request.request_id, error.code, error.message, error.param)
        return Accepted(request.request_id, sum(map(len, prepared.prompts)))

    async def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests with CANCELLED, pages and all; those that have ended already stay as they are."""
        ids = tuple(request_ids)
        self._preparation.drop(ids)
        # Shielded: a caller that goes meanwhile wants the requests gone all the same.
        await asyncio.shield(self._call(lambda: self._cancel(ids)))

    def channel(self, channel_id: str) -> AsyncIterator[tuple[Event, ...]]:
        return self._hub.stream(channel_id)

    def set_plan(self, decode: DecodePlan, rule: str) -> None:
        """Sets the plan of `auto` requests from their next safe point on. From any thread; does not wait."""
        self._commands.put(lambda: self._engine.set_plan(decode, rule))

    def set_explored_plans(self, explored_plans: ExploredPlans | None) -> None:
        """Sets the plans that rounds explore now and then. From any thread; does not wait."""
        self._commands.put(lambda: self._engine.set_explored_plans(explored_plans))

    def snapshot(self) -> ReplicaLoad:
        """The load after the last step or command, with recent rates. Does not wait for the engine.

        Tells the engine what its forwards have come to cost. An engine that has died is silent from then on.
        """
        began_s = self._step_began_s
        load = self._meter.load(self._seen, 0.0 if began_s is None else self._clock() - began_s)
        if load.costs is not None:
            step_cost = load.costs.step
            self._commands.put(lambda: self._engine.set_step_cost(step_cost))
        return load

    async def state(self) -> dict[str, Any]:
        """The plan under way and what runs, for people to read."""
        return await self._call(self._state)

    def check(self) -> None:
        """Raises RuntimeError when the engine's thread has died or a forward hangs."""
        if self._death is not None:
            raise RuntimeError(f"the engine's thread died: {self._death!r}")
        began_s = self._step_began_s
        if began_s is not None and self._clock() - began_s > WEDGED_S:
            raise RuntimeError(f"a forward has been running for more than {WEDGED_S:g} s")
        if not self._thread.is_alive() and not self._stopping:
            raise RuntimeError("the engine's thread has ended")

    async def _call(self, command: Callable[[], T]) -> T:
        """Runs a command on the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # its caller has gone
            try:
                if self._death is not None:
                    raise TriadError(ErrorCode.UNAVAILABLE, "the replica's engine has failed")
                future.set_result(command())
            except TriadError as error:
                future.set_exception(error)
            except BaseException as error:
                logger.exception("a command to the engine failed")
                message = f"the replica could not do it ({type(error).__name__})"
                future.set_exception(TriadError(ErrorCode.INTERNAL, message))

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
                self._look_again()
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._die(error)
            while (command := self._commands.get()) is not None:
                with self._commands_net:
                    command()

    def _obey(self) -> bool:
        """Runs the commands that wait; blocks for one when there is no work. False for the order to stop."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            with self._commands_net:
                command()
            self._look_again()

    def _die(self, error: BaseException) -> None:
        """Ends every request and then the channels, by which the routers know. The engine is not asked."""
        self._death = error
        if self._step_began_s is None:
            self._step_began_s = self._clock()  # silent from now on
        message = "the replica's engine failed"
        try:
            outbox = Outbox()
            for live in self._live.values():
                for choice in live.choices.values():
                    self._give_up(choice, ErrorCode.INTERNAL)
                outbox.add(live.request.channel_id, live.failed(ErrorCode.INTERNAL, message))
            self._send(outbox)
        finally:
            self._live.clear()
            self._choices.clear()
            self._loop.call_soon_threadsafe(self._hub.close)

    def _submit(self, request: GenerateRequest, prepared: Prepared) -> None:
        """Takes a prepared request in. Raises TriadError where its channel has closed meanwhile; one that
        closes from now on cancels it."""
        if not self._hub.is_open(request.channel_id):
            raise TriadError(ErrorCode.UNAVAILABLE, f"the channel {request.channel_id!r} has closed")
        self._take_in(request, prepared)

    def _take_in(self, request: GenerateRequest, prepared: Prepared) -> None:
        """Takes in all choices of a request, or raises TriadError and takes in none."""
        if request.request_id in self._live:
            message = f"a request {request.request_id!r} is running already"
            raise TriadError(ErrorCode.INVALID_REQUEST, message)
        if request.num_indices > self._engine.capacity:
            message = (
                f"this request asks for {request.num_indices} completions, but a replica takes "
                f"{self._engine.capacity} at once; lower n, or send fewer prompts a request"
            )
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "n" if request.num_choices > 1 else "prompt")
        live = RequestState(request)
        try:
            for index in range(request.num_indices):
                self._submit_choice(live, index, prepared)
        except BaseException:
            self._drop(live)
            raise
        self._live[request.request_id] = live

    def _submit_choice(self, live: RequestState, index: int, prepared: Prepared) -> None:
        request = live.request
        prompt_ids = prepared.prompts[index // request.num_choices]
        parser = prepared.parsers[index]
        seed = (request.sampling.seed + index % request.num_choices) % NUM_SEEDS
        name = choice_name(live, index)
        prompt, sampling = request.prompts[index // request.num_choices], request.sampling
        text = self._codec.stream(
            sampling.stop,
            sampling.min_tokens,
            continues_text=not is_chat(prompt),
            shows_tags=parser is not None,
        )
        sequence = self._engine.submit(
            name,
            prompt_ids,
            replace(sampling, seed=seed),
            request.decoding,
            request.timeout_s,
            request.priority,
            prepared.grammars[index],
            text,
            cache_salt=request.cache_salt,
        )
        choice = ChoiceState(live, index, sequence, text, parser)
        if self._on_timeline is not None:
            choice.timeline = Timeline(request.request_id, request.trace_carrier, self._clock(), index)
        self._choices[name] = live.choices[index] = choice
        if index % request.num_choices == 0:
            live.num_prompt_tokens += len(prompt_ids)

    def _drop(self, live: RequestState, code: ErrorCode | None = None) -> None:
        """Ends what still runs of a request, without an event. code: why; None where it has not begun."""
        self._live.pop(live.request.request_id, None)
        for index, choice in live.choices.items():
            name = choice_name(live, index)
            del self._choices[name]
            self._engine.cancel(name)
            if code is not None:
                self._give_up(choice, code)
        live.choices.clear()

    def _give_up(self, choice: ChoiceState, code: ErrorCode) -> None:
        """Counts what a choice has come to that is not to be complete."""
        if choice.sequence.num_completion_tokens:
            choice.live.count(choice, self.replica_id)
        self._close(choice, code)

    def _cancel(self, request_ids: Iterable[str]) -> None:
        self._end(request_ids, ErrorCode.CANCELLED, "the request was cancelled")

    def _end(self, request_ids: Iterable[str], code: ErrorCode, message: str) -> None:
        outbox = Outbox()
        for request_id in request_ids:
            live = self._live.get(request_id)
            if live is not None:
                self._drop(live, code)
                outbox.add(live.request.channel_id, live.failed(code, message))
        self._send(outbox)

    def _cancel_channel(self, channel_id: str) -> None:
        """Cancels the requests of a closed channel. Called on the event loop."""
        self._preparation.drop_channel(channel_id)

        def cancel() -> None:
            if self._death is None:
                self._cancel([r for r, live in self._live.items() if live.request.channel_id == channel_id])

        self._commands.put(cancel)

    def _look_again(self) -> None:
        with self._load_net:
            self._seen = look(self._engine, self.replica_id)

    def _state(self) -> dict[str, Any]:
        scheduler = self._engine.scheduler
        plan = self._engine.active_plan
        return {
            "replica": self.replica_id,
            "plan": {**asdict(plan.decode), "rule": plan.rule},
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_used": scheduler.pages_used,
            "tokens_by_mode": dict(scheduler.counters.tokens_by_mode),
            "forwards_by_mode": dict(scheduler.counters.forwards_by_mode),
        }

    def _publish(self, progress: list[Progress]) -> None:
        outbox = Outbox()
        for made in progress:
            choice = self._choices.get(made.sequence.request_id)
            if choice is None:
                continue  # another choice of its request failed in this step
            try:
                self._tell(outbox, choice, made)
            except Exception:
                live = choice.live
                logger.exception("telling what request %r got has failed; it ends", live.request.request_id)
                self._drop(live, ErrorCode.INTERNAL)
                message = "the replica failed to make a text of this request's tokens"
                outbox.add(live.request.channel_id, live.failed(ErrorCode.INTERNAL, message))
        self._send(outbox)

    def _tell(self, outbox: Outbox, choice: ChoiceState, made: Progress) -> None:
        """Turns what a step did for one choice into its request's events. One that fails fails them all."""
        live = choice.live
        request_id, channel_id = live.request.request_id, live.request.channel_id
        if made.error is not None:
            self._drop(live, made.error)
            outbox.add(channel_id, live.failed(made.error, made.message))
            return
        new = choice.take(made, self._codec, self._clock())
        reason = choice.reason(made)
        if new or reason is not None:
            logprobs = choice.unsent_logprobs
            released = sum(entry.offset < choice.text.num_released for entry in logprobs)
            sent, choice.unsent_logprobs = logprobs[:released], logprobs[released:]
            delta = Delta(
                request_id,
                new.text,
                choice.num_unsent,
                tuple(sent),
                choice.index,
                reason,
                new.reasoning,
                new.calls,
            )
            outbox.add(channel_id, delta)
            choice.num_unsent = 0
        if reason is not None:
            self._end_choice(choice)
            if not live.choices:
                outbox.add(channel_id, live.finished())
                del self._live[request_id]

    def _end_choice(self, choice: ChoiceState) -> None:
        live, sequence = choice.live, choice.sequence
        live.count(choice, self.replica_id)
        self._close(choice, None)
        del live.choices[choice.index]
        del self._choices[sequence.request_id]

    def _close(self, choice: ChoiceState, error: ErrorCode | None) -> None:
        if choice.timeline is not None:
            with self._timelines_net:
                choice.timeline.end(choice.sequence, error, self._clock())
                self._loop.call_soon_threadsafe(self._tell_timeline, choice.timeline)

    def _tell_timeline(self, timeline: Timeline) -> None:
        """Hands a timeline to on_timeline. Called on the event loop."""
        assert self._on_timeline is not None
        with self._timelines_net:
            self._on_timeline(timeline)

    def _send(self, outbox: Outbox) -> None:
        if outbox.events:
            self._loop.call_soon_threadsafe(self._hub.publish, outbox.events)
