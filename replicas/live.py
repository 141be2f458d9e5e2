"""What the service keeps of the requests it has accepted, and of a step's events."""

from dataclasses import dataclass, field

from replicas.engine.sequence import Sequence
from replicas.messages import DecodingReport, Event, GenerateRequest, TextLogprob
from replicas.text import TextStream
from replicas.timeline import Timeline


@dataclass(slots=True)
class Live:
    """An accepted request that has not ended: its open choices by index, and sums over those that ended."""

    request: GenerateRequest
    choices: dict[int, "Choice"] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_completion_tokens: int = 0
    report: DecodingReport | None = None


@dataclass(slots=True)
class Choice:
    """A text of a request, that has not ended. num_unsent: tokens whose text is still held back."""

    live: Live
    index: int
    sequence: Sequence
    text: TextStream
    num_unsent: int = 0
    unsent_logprobs: list[TextLogprob] = field(default_factory=list)
    timeline: Timeline | None = None


@dataclass(slots=True)
class Outbox:
    """A step's events, by channel."""

    events: dict[str, list[Event]] = field(default_factory=dict)

    def add(self, channel_id: str, event: Event) -> None:
        self.events.setdefault(channel_id, []).append(event)


def choice_name(live: Live, index: int) -> str:
    return f"{live.request.request_id}#{index}"
