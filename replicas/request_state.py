"""The state that replicas.requests keeps of each request, and a step's events."""

from dataclasses import dataclass, field, replace

from replicas.engine.sequence import Progress, Sequence
from replicas.errors import ErrorCode
from replicas.messages import (
    DecodingReport,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    Prompt,
    TextLogprob,
    TracedTokens,
)
from replicas.text import TextCodec, TextStream
from replicas.timeline import Timeline


@dataclass(slots=True)
class RequestState:
    """An accepted request that has not ended: its open choices by index, and sums over those that ended."""

    request: GenerateRequest
    choices: dict[int, "ChoiceState"] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_completion_tokens: int = 0
    report: DecodingReport | None = None

    def count(self, choice: "ChoiceState", replica_id: str) -> None:
        """Adds up what a choice has come to, which has ended or is given up."""
        sequence = choice.sequence
        report = sequence.report(replica_id)
        self.report = report if self.report is None else self.report + report
        self.num_completion_tokens += sequence.num_completion_tokens
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
        )


@dataclass(slots=True)
class ChoiceState:
    """One choice of a request, that has not ended."""

    request_state: RequestState
    index: int
    sequence: Sequence
    text: TextStream
    num_unsent: int = 0
    """Tokens whose text is still held back."""
    unsent_logprobs: list[TextLogprob] = field(default_factory=list)
    unsent_trace: list[TracedTokens] = field(default_factory=list)
    """The unsent tokens by forward, where the request asks for them."""
    timeline: Timeline | None = None

    def take(self, made: Progress, codec: TextCodec, now_s: float) -> str:
        """The text that a step's tokens set free; the engine has had the stream accept them."""
        if self.text.failure is not None:
            raise self.text.failure
        count = len(made.token_ids)
        self.num_unsent += count
        if count and made.mode is not None and self.request_state.request.decoding.trace:
            self.unsent_trace.append(TracedTokens(made.mode, made.forward, count))
        if self.timeline is not None and count:
            self.timeline.note(self.sequence, count, now_s)
        begin = self.text.num_tokens - count
        for index, entry in enumerate(made.logprobs, begin):
            self.unsent_logprobs.append(
                codec.logprob(entry, self.text.starts[index], is_first=index == self.text.first)
            )
        text = self.text.take()
        return text if made.reason is None else text + self.text.finish()

    def take_unsent(self) -> tuple[int, tuple[TextLogprob, ...]]:
        """The number of tokens to tell of with the text set free, and the logprobs that belong to it."""
        num_unsent, self.num_unsent = self.num_unsent, 0
        num_released = sum(entry.offset < self.text.num_released for entry in self.unsent_logprobs)
        sent = tuple(self.unsent_logprobs[:num_released])
        del self.unsent_logprobs[:num_released]
        return num_unsent, sent

    def take_trace(self, text: str) -> tuple[TracedTokens, ...]:
        """The trace of the tokens to tell of, the last with the text that they set free."""
        if not self.unsent_trace:
            return ()
        *earlier, last = self.unsent_trace
        self.unsent_trace = []
        return (*earlier, replace(last, text=text))


@dataclass(slots=True)
class Outbox:
    """A step's events, by channel."""

    events: dict[str, list[Event]] = field(default_factory=dict)

    def add(self, channel_id: str, event: Event) -> None:
        self.events.setdefault(channel_id, []).append(event)


def is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and not all(isinstance(item, int) for item in prompt)


def choice_name(state: RequestState, index: int) -> str:
    return f"{state.request.request_id}#{index}"
