"""A request inside the engine: the sole owner of its tokens, counters, page table and status."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from policies.cost import RoundStats
from policies.modes import DecodePlan, Mode
from replicas.engine.ahead import Worth
from replicas.engine.batch import TokenLogprob
from replicas.engine.blocks import Key
from replicas.engine.decoders.round import NO_DRAFT, Draft, Round, SegmentRequest
from replicas.engine.grammar import Grammar
from replicas.engine.history import NO_TOKENS, History, Prefix
from replicas.errors import ErrorCode
from replicas.messages import DecodingOptions, DecodingReport, FinishReason, SamplingParams
from replicas.record import record


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Text(Protocol):
    """The text of one completion, as the engine sees it. Implementation: replicas.text."""

    def accept(self, token_id: int) -> bool:
        """Takes one more token in. True if the text ends with it, as at a stop string.

        Never raises.
        """
        ...


@dataclass(frozen=True, slots=True)
class ActivePlan:
    """The plan of `auto` sequences, and the rule that chose it."""

    decode: DecodePlan
    rule: str


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the engine, from the queue to its end."""

    seq_id: int
    """The engine's number of it, never used again."""
    request_id: str
    tokens: list[int]
    """The prompt, then everything final."""
    max_tokens: int
    """Tokens that it may generate in all."""
    sampling: SamplingParams
    decoding: DecodingOptions
    diffusions: tuple[DecodePlan, ...] = ()
    """The plans of diffusion that keep decoding.max_differing, as policies.quality.plans_within returns them;
    of no use without such a bound."""
    deadline_s: float | None = None
    """Its end at the latest, on the engine's clock."""
    rank: tuple[float, int] = (0.0, 0)
    """Lower ranks come first. Unique and never changed, so that a sequence that waits comes first in the
    end."""
    grammar: Grammar | None = None
    """Its grammar, which has accepted the completion's tokens; None where anything may come."""
    text: Text | None = None
    """Its text, which has accepted the completion's tokens; None where nobody reads it."""
    failure: str | None = None
    """The reason why it can't go on; the engine then ends it."""
    history: History | None = field(init=False, default=None)
    """The tokens again, to be counted, where the sampling has penalties."""
    num_prompt_tokens: int = field(init=False)
    status: Status = Status.WAITING
    num_cached: int = 0
    """Leading tokens whose K/V is valid."""
    pages: list[int] = field(default_factory=list)
    """Its page table: pages[p // page_size] holds position p."""
    num_kept: int = 0
    """Leading pages that are full and findable by content."""
    cache_salt: str = ""
    """It shares pages with sequences of the same salt alone."""
    key_number: Key = field(init=False)
    """The pool's number of the prefix that the kept pages hold."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens but the first, as far as they are cached, where sampling.scores_prompt."""
    num_reused: int = 0
    """Prompt tokens whose K/V another request had left."""
    round: Round | None = None
    """The round in progress; None at a safe point and while prefilling. A preempted sequence keeps its
    round, since part of a block may have been streamed already."""
    draft: Draft = NO_DRAFT
    """What the round before has drafted of the tokens after the seed; only a hint."""
    worth: Worth = field(default_factory=Worth)
    """What was worth verifying of its drafts, where steps are begun ahead."""
    round_plan: DecodePlan | None = None
    """The plan by which the round in progress, or the last one, was begun."""
    planned: tuple[ActivePlan, ActivePlan] | None = None
    """The last plan in force that it was given, and its own of it (engine.decoders.choose)."""
    _round_began: tuple[int, int, int] = (0, 0, 0)
    """Completion tokens, forwards and rows at the beginning of the round in progress."""
    last_mode: Mode | None = None
    """The mode last chosen for it; a trial leaves it as it was."""
    rule: str = ""
    """The rule that chose it."""
    tokens_by_mode: Counter[Mode] = field(default_factory=Counter)
    """Completion tokens, by the mode that made them."""
    num_forwards: int = 0
    """Forwards of its rounds, those of its prefill left out."""
    num_rows: int = 0
    """Query tokens of these forwards."""
    num_switches: int = 0
    """Changes of last_mode."""
    num_preemptions: int = 0
    began_s: float | None = None
    """The time when it first left the queue, on the engine's clock."""
    last_step: int = -1
    """The last step that ran a segment of it; the scheduler serves the longest unserved first."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)
        if self.sampling.has_penalties:
            self.history = History(self.tokens, self.num_prompt_tokens)
        self.key_number = self.cache_salt

    @property
    def num_completion_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_tokens - self.num_completion_tokens

    @property
    def is_kept_lossless(self) -> bool:
        """True if a mode chosen for it must be one whose output is AR's."""
        return (
            self.decoding.lossless
            or self.sampling.keeps_lossless
            or (self.decoding.max_differing is not None and not self.diffusions)
        )

    @property
    def prefill_end(self) -> int:
        """Tokens to have cached before the round goes on or a new one begins.

        A new prompt is cached whole, and its last logits give the first token. What is recomputed
        after a preemption stops short of the seed, so that no mode's tokens depend on preemptions.
        """
        if self.round is not None:
            return self.round.start
        return len(self.tokens) - (1 if self.num_completion_tokens else 0)

    @property
    def is_scored(self) -> bool:
        """True while the prompt's tokens are to be reported and their logits are still to come."""
        return self.sampling.scores_prompt and self.num_completion_tokens == 0

    @property
    def is_prefilling(self) -> bool:
        return self.num_cached < self.prefill_end

    def begin_round(self, begun: Round, plan: DecodePlan, num_coming: int = 0) -> None:
        """num_coming: tokens, not the round's, that are still to be appended."""
        self.round, self.round_plan = begun, plan
        self._round_began = (self.num_completion_tokens + num_coming, self.num_forwards, self.num_rows)

    def end_round(self) -> RoundStats:
        """The stats of the round that has just ended; its successor, where it has one, begins now."""
        assert self.round_plan is not None
        num_tokens, num_forwards, num_rows = self._round_began
        self._round_began = (self.num_completion_tokens, self.num_forwards, self.num_rows)
        is_slowed = self.round_plan.mode is Mode.DIFFUSION and self.sampling.keeps_lossless
        return RoundStats(
            self.round_plan,
            self.num_completion_tokens - num_tokens,
            self.num_forwards - num_forwards,
            self.num_rows - num_rows,
            self.decoding.sets_parameters or is_slowed,
        )

    def history_for(self, request: SegmentRequest) -> Prefix:
        """The tokens that all rows wanted of its next segment see, where its sampling has penalties.

        A causal row sees the segment up to itself; a bidirectional one the causal tokens, or, where there are
        none, the seed, unless that is masked.
        """
        if self.history is None or not request.wanted:
            return NO_TOKENS
        first = request.wanted[0]
        if request.num_causal:
            return self.history.first(self.num_cached + first + 1)
        shows_seed = request.token_ids[0] == self.tokens[self.num_cached]
        return self.history.first(self.num_cached + shows_seed)

    def note_mode(self, mode: Mode, rule: str) -> None:
        """A round or the prefill begins in this mode, chosen by this rule."""
        if self.last_mode is not None and mode is not self.last_mode:
            self.num_switches += 1
        self.last_mode = mode
        self.rule = rule

    def append(
        self, tokens: tuple[int, ...], mode: Mode, eos_token_ids: frozenset[int]
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        """Appends final tokens up to the text's end or max_tokens.

        Returns those that were taken, and why the sequence ends; None where it goes on.
        """
        if self.max_tokens == 0:
            return (), FinishReason.LENGTH
        for count, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            if self.history is not None:
                self.history.append(token)
            self.tokens_by_mode[mode] += 1
            is_stop = self.text is not None and self.text.accept(token)
            if is_stop or (token in eos_token_ids and not self.sampling.ignore_eos):
                return tokens[:count], FinishReason.STOP
            if self.grammar is not None:
                self.grammar.accept(token)
                if self.grammar.is_complete:
                    return tokens[:count], FinishReason.STOP
            if self.num_remaining <= 0:
                return tokens[:count], FinishReason.LENGTH
        return tokens, None

    def report(self, replica_id: str) -> DecodingReport:
        return DecodingReport(
            tokens_by_mode=dict(self.tokens_by_mode),
            num_forwards=self.num_forwards,
            num_switches=self.num_switches,
            rule=self.rule,
            replica_id=replica_id,
        )


@record
class Progress:
    """A step's effect on one sequence, which has ended when reason or error is set."""

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: FinishReason | None = None
    error: ErrorCode | None = None
    message: str = ""
    mode: Mode | None = None
    """The mode that made the tokens; None where there are none."""
    forward: int = 0
    """The number of the sequence's forward that made them, from 1; 0 is the prefill."""

    @property
    def ended(self) -> bool:
        return self.reason is not None or self.error is not None
