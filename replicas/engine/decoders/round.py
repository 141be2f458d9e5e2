"""The interface of every decoder: a round, which takes a sequence from one safe point to the next.

At a safe point all tokens of a sequence but the last, the seed, have their K/V cached. A round says
which segment it wants next, is given that segment's output, and in the end leaves the sequence at
its next safe point. The scheduler knows nothing of modes beyond this interface.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

from policies.modes import Mode
from replicas.engine.batch import SegmentOutput, TokenLogprob
from replicas.record import record


@record
class SegmentRequest:
    """The segment that a sequence wants next, from its first token that is not cached on."""

    token_ids: tuple[int, ...]
    num_causal: int
    adapter: bool
    """True if the adapter is on for the bidirectional tokens."""
    wanted: tuple[int, ...]
    """Indices of the tokens to sample; this and the fields above are as in engine.batch.Segment."""
    successor: "Round | None" = None
    """The round that this segment begins behind the block that it commits; it goes on once that is done."""
    is_given: bool = False
    """True if the causal tokens are final, so that all their rows but the last are to give the token that
    follows in the segment, for its log-probability."""
    fixed: tuple[int, ...] = ()
    """As in engine.batch.Segment."""

    @property
    def drafts(self) -> bool:
        """True if there are masks of a draft behind the causal tokens, which can be left out."""
        return self.successor is None and 0 < self.num_causal < len(self.token_ids)

    def cut(self, num_causal: int) -> "SegmentRequest":
        """The request with its first num_causal tokens, which are causal, and what is behind the causal
        ones."""
        gone = self.num_causal - num_causal
        return replace(
            self,
            token_ids=self.token_ids[:num_causal] + self.token_ids[self.num_causal :],
            num_causal=num_causal,
            wanted=tuple(
                index - gone * (index >= self.num_causal)
                for index in self.wanted
                if not num_causal <= index < self.num_causal
            ),
        )

    def without_draft(self) -> "SegmentRequest":
        """The request without what is behind the causal tokens."""
        wanted = tuple(index for index in self.wanted if index < self.num_causal)
        return replace(self, token_ids=self.token_ids[: self.num_causal], adapter=False, wanted=wanted)


@record
class Draft:
    """Tokens drafted for the positions after a sequence's seed; empty where there are none."""

    token_ids: tuple[int, ...] = ()
    probs: tuple[float, ...] = ()
    """Their probability by the forward that drafted them."""

    @classmethod
    def behind(cls, request: SegmentRequest, output: SegmentOutput) -> "Draft":
        """The draft that a segment has made behind its causal tokens."""
        first = sum(index < request.num_causal for index in request.wanted)
        return cls(output.token_ids[first:], output.probs[first:])


NO_DRAFT = Draft()


@record
class RoundProgress:
    """The effect of a segment's output on its round."""

    tokens: tuple[int, ...] = ()
    """Newly final tokens, to be appended to the sequence and streamed."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """The log-probabilities of these tokens, where the request asks for them; else empty."""
    num_cached: int = 0
    """The number of tokens from the seed on that now have valid K/V; 0 until the round's end."""
    done: bool = False
    """True if the round is over: the sequence is at its next safe point, or in the request's successor."""
    draft: Draft = NO_DRAFT
    """What the round has drafted of the tokens after its own; for the next round, if that can use it."""


class Round(ABC):
    mode: Mode
    start: int
    """The seed's position."""

    @property
    def num_untold(self) -> int:
        """Tokens that are final, and not yet among those of any RoundProgress."""
        return 0

    @abstractmethod
    def next_segment(self, following: int = 0) -> SegmentRequest:
        """The segment that the round wants next. A pure question, which may be asked any number of times.

        following: the length of the block that is to follow this one, where a decoder can begin it in the
        same forward; 0 for none.
        """

    def begin(self, output: SegmentOutput, untold: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Begins the successor of a segment with that segment's output: its seed, and what is behind it.

        untold: the final tokens before the seed that are told in the same step.
        Returns the final tokens, the seed among them.
        """
        raise NotImplementedError(f"a round of {self.mode} begins at a safe point")

    @abstractmethod
    def apply_output(self, request: SegmentRequest, output: SegmentOutput) -> RoundProgress:
        """Takes the output of a segment that next_segment() asked for since the last output.

        request: its answer as it was run; a grammar may have cut its last tokens off.
        """
