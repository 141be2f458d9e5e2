"""The state that replicas.requests keeps of each request, and a step's events."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from replicas.engine.batch import TokenLogprob
from replicas.engine.sequence import Progress, Sequence
from replicas.errors import ErrorCode
from replicas.messages import (
    DecodingReport,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Prompt,
    TextLogprob,
    TracedTokens,
)
from replicas.text import TextCodec
from replicas.text_stream import TextStream
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

    request_state: RequestState
    index: int
    sequence: Sequence
    text: TextStream
    parser: OutputParser | None = None
    """Tells its text apart; None where all of it is the answer."""
    unsent_ids: list[int] = field(default_factory=list)
    """Tokens that no Delta has told of yet."""
    unsent_text: str = ""
    unsent_logprobs: list[TextLogprob] = field(default_factory=list)
    num_sent: int = 0
    """Tokens that Deltas have told of."""
    echoed: "Echo | None" = None
    """Its prompt, still to be sent before its own text; None where it was, or is not asked for."""
    num_before: int = 0
    """Characters of the prompt before its own text."""
    unsent_trace: list[TracedTokens] = field(default_factory=list)
    """The unsent tokens by forward, where the request asks for them."""
    timeline: Timeline | None = None

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Tokens of its reasoning; None where the model has no marks of any."""
        if self.parser is None or not self.parser.has_marks:
            return None
        end = self.parser.reasoning_end
        return self.text.num_tokens if end is None else bisect_left(self.text.starts, end)

    def take(self, made: Progress, codec: TextCodec, now_s: float) -> list[Delta]:
        """The Deltas that a step's tokens bring; the engine has had the stream accept them."""
        if self.text.failure is not None:
            raise self.text.failure
        self._note(made, codec, now_s)
        self.unsent_text += self.text.take()
        if made.reason is not None:
            self.unsent_text += self.text.finish()  # which may complete a stop string
        reason = FinishReason.STOP if self.text.stopped else made.reason
        deltas = self._echo(codec)
        for num_tokens in self._intervals():
            deltas.append(self._delta(num_tokens, self.text.releases[self.num_sent + num_tokens - 1]))
        is_due = bool(self.unsent_text) and self.request_state.request.tokens_per_delta is None
        if reason is not None or is_due:
            deltas.append(self._delta(len(self.unsent_ids), self.text.num_released, reason))
        return deltas

    def _echo(self, codec: TextCodec) -> list[Delta]:
        """The Delta that has the prompt, before the first of its own text."""
        echoed, self.echoed = self.echoed, None
        if echoed is None:
            return []
        self.num_before = len(echoed.text)
        request = self.request_state.request
        logprobs: tuple[TextLogprob, ...] = ()
        if request.sampling.scores_prompt:
            logprobs = echoed.logprobs(codec, self.sequence.prompt_logprobs)
        return [Delta(request.request_id, echoed.text, 0, logprobs, self.index)]

    def _intervals(self) -> Iterator[int]:
        """The tokens of each Delta that is due by the request's tokens_per_delta."""
        per_delta = self.request_state.request.tokens_per_delta
        if per_delta is None:
            return
        while len(self.unsent_ids) >= (wanted := per_delta if self.num_sent else 1):
            yield wanted

    def _delta(self, num_tokens: int, num_released: int, reason: FinishReason | None = None) -> Delta:
        """A Delta of the first unsent tokens, of the text up to num_released characters of the completion,
        and of the log-probabilities of the tokens whose text begins in it."""
        num_chars = num_released - (self.text.num_released - len(self.unsent_text))
        text, self.unsent_text = self.unsent_text[:num_chars], self.unsent_text[num_chars:]
        ids, self.unsent_ids = self.unsent_ids[:num_tokens], self.unsent_ids[num_tokens:]
        self.num_sent += num_tokens
        request = self.request_state.request
        logprobs = self._take_logprobs(num_released, reason) if self.unsent_logprobs else ()
        parsed = self._parsed(text, is_last=reason is not None)
        if reason is FinishReason.STOP and self.parser is not None and self.parser.ends_with_call:
            reason = FinishReason.TOOL_CALLS
        return Delta(
            request.request_id,
            parsed.text,
            num_tokens,
            logprobs,
            self.index,
            reason,
            tuple(ids) if request.return_token_ids else (),
            None if reason is None else self.text.stop_reason,
            parsed.reasoning,
            parsed.calls,
            self._take_trace(num_tokens, parsed.text) if self.unsent_trace else (),
        )

    def _take_logprobs(self, num_released: int, reason: FinishReason | None) -> tuple[TextLogprob, ...]:
        """The log-probabilities of the tokens whose text begins before num_released characters of the
        completion, by places in the text with the prompt."""
        released = sum(entry.offset < num_released for entry in self.unsent_logprobs)
        if reason is not None and self.request_state.request.sampling.scores_prompt:
            released = len(self.unsent_logprobs)  # whoever scores counts tokens, not text
        logprobs, self.unsent_logprobs = self.unsent_logprobs[:released], self.unsent_logprobs[released:]
        return tuple(replace(entry, offset=entry.offset + self.num_before) for entry in logprobs)

    def _take_trace(self, num_tokens: int, text: str) -> tuple[TracedTokens, ...]:
        """The trace of the first num_tokens unsent tokens, the last of them with the text that comes now."""
        taken: list[TracedTokens] = []
        while num_tokens > 0 and self.unsent_trace:
            part = self.unsent_trace.pop(0)
            if part.num_tokens > num_tokens:
                self.unsent_trace.insert(0, replace(part, num_tokens=part.num_tokens - num_tokens))
                part = replace(part, num_tokens=num_tokens)
            num_tokens -= part.num_tokens
            taken.append(part)
        if taken:
            taken[-1] = replace(taken[-1], text=text)
        return tuple(taken)

    def _parsed(self, text: str, is_last: bool) -> Parsed:
        if self.parser is None:
            return Parsed(text)
        parsed = self.parser.push(text)
        return parsed + self.parser.finish() if is_last else parsed

    def _note(self, made: Progress, codec: TextCodec, now_s: float) -> None:
        count = len(made.token_ids)
        self.unsent_ids += made.token_ids
        if count and made.mode is not None and self.request_state.request.decoding.trace:
            self.unsent_trace.append(TracedTokens(made.mode, made.forward, count))
        if self.timeline is not None and count:
            self.timeline.note(self.sequence, count, now_s)
        begin = self.text.num_tokens - count
        for index, entry in enumerate(made.logprobs, begin):
            self.unsent_logprobs.append(
                codec.logprob(entry, self.text.starts[index], is_first=index == self.text.first)
            )


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as a choice's text begins with it."""

    ids: list[int]
    text: str
    starts: list[int]
    """For each id, how many characters of the text come before its own."""

    @classmethod
    def of(cls, prompt: Prompt, ids: list[int], codec: TextCodec) -> "Echo":
        stream = codec.stream()
        text = stream.push(tuple(ids)) + stream.finish()
        return cls(ids, prompt if isinstance(prompt, str) else text, stream.starts)

    def logprobs(self, codec: TextCodec, made: list[TokenLogprob]) -> tuple[TextLogprob, ...]:
        """Of each id but the first, before which there was nothing to go by, what the model made of it."""
        first = TextLogprob(codec.token_bytes(self.ids[0], is_first=True), None)
        rest = zip(made, self.starts[1:], strict=True)
        return (first, *(codec.logprob(entry, start) for entry, start in rest))


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
