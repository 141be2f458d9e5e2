"""The timeline of one choice of a request, noted only where its channel is told of it anyway."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from policies.modes import Mode
from replicas.engine.sequence import Sequence
from replicas.errors import ErrorCode


@dataclass(slots=True)
class ModeSpan:
    """A time in one mode, from one safe point to another."""

    mode: Mode
    rule: str
    since_s: float
    until_s: float
    num_forwards: int = 0
    """A round of self-speculation is one, a commit that begins the next block too."""
    num_tokens: int = 0


@dataclass(slots=True)
class Timeline:
    """The times of one choice by the engine's clock, in seconds; None for what has not come."""

    request_id: str
    trace_carrier: Mapping[str, str]
    """The caller's span, as headers."""
    submitted_s: float
    index: int = 0
    """The choice's index in its request."""
    began_s: float | None = None
    """The time when it left the queue."""
    first_token_s: float | None = None
    ended_s: float | None = None
    spells: list[ModeSpan] = field(default_factory=list)
    """The spans of its modes, in order."""
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_preemptions: int = 0
    error: ErrorCode | None = None
    _num_forwards: int = 0

    def note(self, sequence: Sequence, num_tokens: int, now_s: float) -> None:
        """Notes that a step has brought so many tokens."""
        if self.first_token_s is None:
            self.first_token_s = now_s
        mode = sequence.last_mode
        if mode is None:
            return
        if not self.spells or self.spells[-1].mode is not mode:
            since_s = self.spells[-1].until_s if self.spells else now_s
            self.spells.append(ModeSpan(mode, sequence.rule, since_s, now_s))
        spell = self.spells[-1]
        spell.until_s = now_s
        spell.rule = sequence.rule
        spell.num_tokens += num_tokens
        spell.num_forwards += sequence.num_forwards - self._num_forwards
        self._num_forwards = sequence.num_forwards

    def end(self, sequence: Sequence, error: ErrorCode | None, now_s: float) -> None:
        self.ended_s = now_s
        self.error = error
        self.began_s = sequence.began_s
        self.num_prompt_tokens = sequence.num_prompt_tokens
        self.num_reused_tokens = sequence.num_reused
        self.num_preemptions = sequence.num_preemptions
