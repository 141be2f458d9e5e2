"""The requests in the engine: their choices, text and events, and exactly one last event for each.

Belongs to the engine's thread (replicas.engine_thread): once that runs, nothing else may call what is here.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from policies.failures import Failures
from replicas.engine.engine import Engine
from replicas.engine.sequence import Progress
from replicas.errors import ErrorCode, TriadError
from replicas.messages import NUM_SEEDS, Event, GenerateRequest
from replicas.preparation import Prepared
from replicas.request_state import ChoiceState, Outbox, RequestState, choice_name, is_chat
from replicas.text import TextCodec
from replicas.timeline import Timeline

logger = logging.getLogger(__name__)


class RequestTable:
    """What is kept of the requests that an engine has taken and not ended.

    clock: seconds, monotonic; the engine's.
    is_open: tells whether the channel of this id is open.
    send: given events by channel id, once a step or command that made any.
    on_timeline: given the timeline of each choice that has ended; None keeps none.
    """

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        replica_id: str,
        clock: Callable[[], float],
        is_open: Callable[[str], bool],
        send: Callable[[Mapping[str, list[Event]]], None],
        on_timeline: Callable[[Timeline], None] | None = None,
    ):
        self._engine = engine
        self._codec = codec
        self._replica_id = replica_id
        self._clock = clock
        self._is_open = is_open
        self._send = send
        self._on_timeline = on_timeline
        self._timeline_failures = Failures("a timeline")
        self._states: dict[str, RequestState] = {}
        self._choices: dict[str, ChoiceState] = {}  # by their names in the engine

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The ids of the requests that have not ended."""
        return tuple(self._states)

    def submit(self, request: GenerateRequest, prepared: Prepared) -> None:
        """Takes in all choices of a prepared request, or raises TriadError and takes in none.

        Refuses one whose channel has closed meanwhile; a channel that closes from now on cancels it.
        """
        if not self._is_open(request.channel_id):
            raise TriadError(ErrorCode.UNAVAILABLE, f"the channel {request.channel_id!r} has closed")
        if request.request_id in self._states:
            message = f"a request {request.request_id!r} is running already"
            raise TriadError(ErrorCode.INVALID_REQUEST, message)
        if request.num_indices > self._engine.capacity:
            message = (
                f"this request asks for {request.num_indices} completions, but a replica takes "
                f"{self._engine.capacity} at once; lower n, or send fewer prompts a request"
            )
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "n" if request.num_choices > 1 else "prompt")
        state = RequestState(request)
        try:
            for index in range(request.num_indices):
                self._submit_choice(state, index, prepared)
        except BaseException:
            self._drop(state)
            raise
        self._states[request.request_id] = state

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests with CANCELLED; those that have ended already stay as they are."""
        self.end(request_ids, ErrorCode.CANCELLED, "the request was cancelled")

    def cancel_channel(self, channel_id: str) -> None:
        """Cancels the requests of a channel that has closed."""
        self.cancel([r for r, state in self._states.items() if state.request.channel_id == channel_id])

    def end(self, request_ids: Iterable[str], code: ErrorCode, message: str) -> None:
        """Ends requests as failed, pages and all; those that have ended already stay as they are."""
        outbox = Outbox()
        for request_id in request_ids:
            state = self._states.get(request_id)
            if state is not None:
                self._fail(outbox, state, code, message)
        self._flush(outbox)

    def end_all_of_dead_engine(self) -> None:
        """Ends every request with INTERNAL. The engine is not asked."""
        try:
            outbox = Outbox()
            for state in self._states.values():
                for choice in state.choices.values():
                    self._give_up(choice, ErrorCode.INTERNAL)
                failed = state.failed(ErrorCode.INTERNAL, "the replica's engine failed")
                outbox.add(state.request.channel_id, failed)
            self._flush(outbox)
        finally:
            self._states.clear()
            self._choices.clear()

    def publish(self, progress: Iterable[Progress]) -> None:
        """Turns what a step made into its requests' events, and sends them."""
        outbox = Outbox()
        for made in progress:
            choice = self._choices.get(made.sequence.request_id)
            if choice is None:
                continue  # another choice of its request failed in this step
            try:
                self._add_events(outbox, choice, made)
            except Exception:
                state = choice.request_state
                logger.exception("making the events of request %r failed; it ends", state.request.request_id)
                message = "the replica failed to make a text of this request's tokens"
                self._fail(outbox, state, ErrorCode.INTERNAL, message)
        self._flush(outbox)

    def _submit_choice(self, state: RequestState, index: int, prepared: Prepared) -> None:
        request = state.request
        place = index // request.num_choices
        prompt_ids, parser = prepared.prompts[place], prepared.parsers[index]
        seed = (request.sampling.seed + index % request.num_choices) % NUM_SEEDS
        name = choice_name(state, index)
        sampling = request.sampling
        continues_text = not is_chat(request.prompts[place]) or request.template.continue_final_message
        text = self._codec.completion(
            sampling, self._engine.spec.eos_token_ids, continues_text, parser is not None
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
        choice = ChoiceState(state, index, sequence, text, parser)
        if request.echo:
            choice.echoed = prepared.echoes[place]
        if self._on_timeline is not None:
            choice.timeline = Timeline(request.request_id, request.trace_carrier, self._clock(), index)
        self._choices[name] = state.choices[index] = choice
        if index % request.num_choices == 0:
            state.num_prompt_tokens += len(prompt_ids)

    def _add_events(self, outbox: Outbox, choice: ChoiceState, made: Progress) -> None:
        """Adds the events of what a step did for one choice. One that fails fails its whole request."""
        state = choice.request_state
        channel_id = state.request.channel_id
        if made.error is not None:
            self._fail(outbox, state, made.error, made.message)
            return
        deltas = choice.take(made, self._codec, self._clock())
        for delta in deltas:
            outbox.add(channel_id, delta)
        if deltas and deltas[-1].reason is not None:
            self._end_choice(choice)
            if not state.choices:
                outbox.add(channel_id, state.finished())
                del self._states[state.request.request_id]

    def _end_choice(self, choice: ChoiceState) -> None:
        state = choice.request_state
        state.count(choice, self._replica_id)
        self._close(choice, None)
        del state.choices[choice.index]
        del self._choices[choice.sequence.request_id]

    def _fail(self, outbox: Outbox, state: RequestState, code: ErrorCode, message: str) -> None:
        """Ends a request as failed, by its last event."""
        self._drop(state, code)
        outbox.add(state.request.channel_id, state.failed(code, message))

    def _drop(self, state: RequestState, code: ErrorCode | None = None) -> None:
        """Ends what still runs of a request, without an event. code: why; None where it has not begun."""
        self._states.pop(state.request.request_id, None)
        for index, choice in state.choices.items():
            name = choice_name(state, index)
            del self._choices[name]
            self._engine.cancel(name)
            if code is not None:
                self._give_up(choice, code)
        state.choices.clear()

    def _give_up(self, choice: ChoiceState, code: ErrorCode) -> None:
        """Counts what a choice has come to that is not to be complete."""
        if choice.sequence.num_completion_tokens:
            choice.request_state.count(choice, self._replica_id)
        self._close(choice, code)

    def _close(self, choice: ChoiceState, error: ErrorCode | None) -> None:
        if choice.timeline is not None and self._on_timeline is not None:
            with self._timeline_failures:
                choice.timeline.end(choice.sequence, error, self._clock())
                self._on_timeline(choice.timeline)

    def _flush(self, outbox: Outbox) -> None:
        if outbox.events:
            self._send(outbox.events)
