"""The state that the service keeps of the requests it has accepted, and of a step's events."""

from bisect import bisect_left
from dataclasses import dataclass, field

from replicas.engine.sequence import Progress, Sequence
from replicas.errors import ErrorCode
from replicas.messages import (
    DecodingReport,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Prompt,
    TextLogprob,
)
from replicas.text import TextCodec, TextStream
from replicas.timeline import Timeline
from replicas.tools.output import OutputParser, Parsed


@dataclass(slots=True)
class RequestState:
    """An accepted request that has not ended: its open choices by index, and sums over those that ended."""

    request: GenerateRequest
    choices: dict[int, "ChoiceState"] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_completion_tokens: int = 0
    num_reasoning_tokens: int | None = None
    report: DecodingReport | None = None

    def count(self, choice: "ChoiceState", replica_id: str) -> None:
        """Adds up what a choice has come to, which has ended or is given up."""
        sequence = choice.sequence
        report = sequence.report(replica_id)
        self.report = report if self.report is None else self.report + report
        self.num_completion_tokens += sequence.num_completion_tokens
        reasoned = choice.num_reasoning_tokens
        if reasoned is not None:
            self.num_reasoning_tokens = reasoned + (self.num_reasoning_tokens or 0)
        if choice.index % self.request.num_choices == 0:
            self.num_reused_tokens += sequence.num_reused

    def failed(self, code: ErrorCode, message: str) -> Failed:
        """The event that ends the request as failed, once its choices are given up."""
        return Failed(self.request.request_id, code, message, self.report, self.num_completion_tokens)

    def finished(self) -> Finished:
        """The event that ends the request as complete, once its last choice has ended."""
        assert self.report is not None
        return Finished(
            self.request.request_id,
            self.num_prompt_tokens,
            self.num_completion_tokens,
            self.report,
            self.num_reused_tokens,
            self.num_reasoning_tokens,
        )


@dataclass(slots=True)
class ChoiceState:
    """One choice of a request, that has not ended."""

    live: RequestState
    index: int
    sequence: Sequence
    text: TextStream
    parser: OutputParser | None = None
    """Tells its text apart; None where all of it is the answer."""
    num_unsent: int = 0
    """Tokens whose text is still held back."""
    unsent_logprobs: list[TextLogprob] = field(default_factory=list)
    timeline: Timeline | None = None

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Tokens of its reasoning; None where the model has no marks of any."""
        if self.parser is None or not self.parser.has_marks:
            return None
        end = self.parser.reasoning_end
        return self.text.num_tokens if end is None else bisect_left(self.text.starts, end)

    def take(self, made: Progress, codec: TextCodec, now_s: float) -> Parsed:
        """The text that a step's tokens set free; the engine has had the stream accept them."""
        if self.text.failure is not None:
            raise self.text.failure
        count = len(made.token_ids)
        self.num_unsent += count
        if self.timeline is not None and count:
            self.timeline.note(self.sequence, count, now_s)
        begin = self.text.num_tokens - count
        for index, entry in enumerate(made.logprobs, begin):
            self.unsent_logprobs.append(
                codec.logprob(entry, self.text.starts[index], is_first=index == self.text.first)
            )
        text = self.text.take()
        if made.reason is not None:
            text += self.text.finish()
        if self.parser is None:
            return Parsed(text)
        parsed = self.parser.push(text)
        return parsed if made.reason is None else parsed + self.parser.finish()

    def reason(self, made: Progress) -> FinishReason | None:
        """Why it has ended; None where it goes on."""
        if made.reason is None:
            return None
        reason = FinishReason.STOP if self.text.stopped else made.reason
        if reason is FinishReason.STOP and self.parser is not None and self.parser.ends_with_call:
            return FinishReason.TOOL_CALLS
        return reason


@dataclass(slots=True)
class Outbox:
    """A step's events, by channel."""

    events: dict[str, list[Event]] = field(default_factory=dict)

    def add(self, channel_id: str, event: Event) -> None:
        self.events.setdefault(channel_id, []).append(event)


def is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and not all(isinstance(item, int) for item in prompt)


def choice_name(live: RequestState, index: int) -> str:
    return f"{live.request.request_id}#{index}"
