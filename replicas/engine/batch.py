"""The data of one forward: the scheduler makes a ScheduledBatch; whatever implements Runner executes it."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf, log
from typing import Protocol

from policies.modes import Mode
from replicas.engine.decoders.learned_sampler import LearnedSampler
from replicas.engine.history import NO_TOKENS, Prefix
from replicas.messages import SamplingParams
from replicas.record import record


@record
class Segment:
    """Consecutive tokens of one sequence in one forward.

    Its first num_causal tokens are causal: their queries see the sequence's cached tokens and, inside
    the segment, themselves and what is before; their K/V is kept. The rest is bidirectional: its
    queries see the cached tokens and the whole segment; its K/V lands in the same page slots but is
    garbage afterwards: the caller overwrites it by causal tokens before it counts as cached.

    """

    seq_id: int
    """The engine's number of the sequence."""
    start: int
    """The position of token_ids[0]; the K/V of positions 0..start-1 is cached."""
    token_ids: tuple[int, ...]
    pages: tuple[int, ...]
    """The page table; pages[p // page_size] holds position p, up to start + len(token_ids) - 1."""
    num_causal: int
    """The number of causal tokens: all, none, or fewer where the next block's masks are behind them."""
    adapter: bool
    """True if the adapter is on for the bidirectional tokens; it never is for causal ones."""
    wanted: tuple[int, ...]
    """Indices into token_ids whose logits are sampled, ascending; may be empty."""
    sampling: SamplingParams
    prompt_len: int = 0
    """Tokens of the sequence's prompt."""
    history: Prefix = NO_TOKENS
    """The tokens before start and maybe some of token_ids, where the sampling has penalties and any row is
    wanted; else empty."""
    fixed: tuple[int, ...] = ()
    """Those of the bidirectional tokens that penalties count in the rows of the others; empty without
    penalties."""
    allowed: tuple[bytes | None, ...] = ()
    """For each wanted index that is causal a mask of what may be sampled (engine.grammar), None for anything;
    empty where all may be anything."""
    follows: "Segment | None" = None
    """The sequence's segment in the step before, where this one is begun before that one's output is known.
    The output says where it starts, which may be up to num_checked - 1 positions later, and what its causal
    tokens are, of which there may be fewer (engine.ahead.settled); pages hold the longest outcome."""

    @property
    def num_checked(self) -> int:
        """The number of causal tokens whose logits are sampled: 1 of a step, all of a verify."""
        return sum(index < self.num_causal for index in self.wanted)

    @property
    def num_drafted(self) -> int:
        """The number of tokens drafted behind these."""
        return len(self.wanted) - self.num_checked

    @property
    def is_causal(self) -> bool:
        """True if all of the segment's tokens are causal."""
        return self.num_causal == len(self.token_ids)

    @property
    def num_adapted(self) -> int:
        """The number of tokens, its last ones, for which the adapter is on."""
        return len(self.token_ids) - self.num_causal if self.adapter else 0

    @property
    def sampled_positions(self) -> tuple[int, ...]:
        """For each wanted index the position of the token that its logits predict.

        Causal logits at position i predict i + 1; bidirectional ones predict i itself (no shift).
        The random numbers of a sample depend on (seed, this position) alone.
        """
        return tuple(self.start + index + (index < self.num_causal) for index in self.wanted)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One forward: segments of any kinds and sequences, at most one segment a sequence."""

    segments: tuple[Segment, ...]
    mode: Mode | None = None
    """The mode of nearly all that decodes in it; None for prompts alone, and mixtures. No runner needs it."""

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)


TokenProb = tuple[int, float]
"""A token id and its log-probability."""


@record
class SegmentOutput:
    """The sampled tokens of a segment, one for each index of Segment.wanted.

    They are fewer, behind causal tokens, where nothing can be sampled from a later row.
    """

    token_ids: tuple[int, ...]
    """The chosen tokens; never the mask token."""
    probs: tuple[float, ...]
    """Their probability by the model itself (softmax of the raw logits, before temperature and filters),
    the confidence of `diffusion`."""
    top: tuple[tuple[TokenProb, ...], ...] = ()
    """The most probable tokens in place of each chosen one, in order, where they are asked for."""
    failure: str | None = None
    """The reason why nothing could be sampled from the segment's rows; token_ids and probs are then empty."""

    def logprobs(self, count: int) -> tuple["TokenLogprob", ...]:
        """The log-probabilities of the first count tokens; empty where none were asked for."""
        if not self.top:
            return ()
        chosen = zip(self.token_ids[:count], self.probs, self.top, strict=False)
        return tuple(TokenLogprob(token, _logprob(token, prob, top), top) for token, prob, top in chosen)


def _logprob(token_id: int, prob: float, top: Seq[TokenProb]) -> float:
    """The log-probability of a chosen token: the very number that `top` has, where it is one of them."""
    for other_id, logprob in top:
        if other_id == token_id:
            return logprob
    return log(prob) if prob > 0 else -inf


@record
class TokenLogprob:
    """A token, its log-probability, and the most probable tokens in its place."""

    token_id: int
    logprob: float
    top: tuple[TokenProb, ...]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The facts about the model behind a Runner that the engine needs."""

    modes: tuple[Mode, ...]
    mask_token_id: int | None
    eos_token_ids: frozenset[int]
    max_context: int
    num_pages: int
    page_size: int
    vocab_size: int
    denoise_with_adapter: bool = False
    """True if the adapter is on in denoising forwards as well as in drafts."""
    sampler: LearnedSampler | None = None
    """The checkpoint's own sampler, where it has one."""
    runs_ahead: bool = False
    """True if the runner is an AheadRunner: it takes a step before the output of the one before is known."""

    @property
    def risk(self) -> float | None:
        """The risk by which diffusion decodes unless something else is asked for; None without a sampler."""
        return None if self.sampler is None else self.sampler.risk


class RunnerLost(Exception):
    """The runner can run nothing any more, whatever it is given."""


class Runner(Protocol):
    """Runs forwards. Implementations: replicas.model.runner (torch), and scripted ones in tests."""

    @property
    def spec(self) -> ModelSpec: ...

    def run(self, batch: ScheduledBatch, /) -> Seq[SegmentOutput]:
        """Runs a forward: one output a segment, in the batch's order. RunnerLost: it is of no use from now
        on."""
        ...


class Begun(Protocol):
    """A forward that has been begun."""

    def outputs(self, segments: Seq[Segment], /) -> Seq[SegmentOutput]:
        """Waits for the forward; one output a segment.

        segments: those of its batch that are still of use, in any order, as they have come to be: none of
        them follows another any more
        """
        ...


class AheadRunner(Runner, Protocol):
    """A runner whose device works on one forward while the host prepares the next."""

    def begin(self, batch: ScheduledBatch, before: Begun | None, /) -> Begun:
        """Begins a forward without waiting for it. Forwards are run in the order in which they are begun.

        before: the last one begun, whose output no one has waited for, where segments follow those of it
        """
        ...

    def can_be_followed(self, segment: Segment, /) -> bool:
        """True if a segment may follow this one before the host has seen this one's tokens."""
        ...

    def following_pairs(self) -> Iterable[tuple[ScheduledBatch, ScheduledBatch]]:
        """Batches to begin one behind the other while warming up, after which none that follows another waits
        for a compiler. Of several processes all are to begin them."""
        ...


class ServingRunner(Runner, Protocol):
    """A runner that a replica serves with."""

    def warm_up_batches(self, max_running: int, max_step_tokens: int, /) -> Iterable[ScheduledBatch]:
        """The batches after which no forward within the engine's bounds waits for a compiler; to be run
        before anything is served, as they write garbage into the K/V pages."""
        ...

    def settle(self) -> None:
        """Gives back the memory that warming up and measuring took, K/V pages among it; to be called before
        anything is served."""
        ...
