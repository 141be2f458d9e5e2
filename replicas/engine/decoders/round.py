"""The interface of every decoder: a round, which takes a sequence from one safe point to the next.

At a safe point all tokens of a sequence but the last, the seed, have their K/V cached. A round says
which segment it wants next, is given that segment's output, and in the end leaves the sequence at
its next safe point. The scheduler knows nothing of modes beyond this interface.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from policies.modes import Mode
from replicas.engine.batch import SegmentOutput, TokenLogprob


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """The segment that a sequence wants next, from its first token that is not cached on."""

    token_ids: tuple[int, ...]
    num_causal: int
    adapter: bool
    wanted: tuple[int, ...]
    """Indices of the tokens to sample; this and the fields above are as in engine.batch.Segment."""
    successor: "Round | None" = None
    """The round that this segment begins behind the block that it commits; it goes on once that is done."""


@dataclass(frozen=True, slots=True)
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


class Round(ABC):
    mode: Mode
    start: int
    """The seed's position."""

    @abstractmethod
    def next_segment(self, following: int = 0) -> SegmentRequest:
        """The segment that the round wants next. A pure question, which may be asked any number of times.

        following: the length of the block that is to follow this one, where a decoder can begin it in the
        same forward; 0 for none.
        """

    @abstractmethod
    def apply_output(self, request: SegmentRequest, output: SegmentOutput) -> RoundProgress:
        """Takes the output of a segment that next_segment() asked for since the last output.

        request: its answer as it was run; a grammar may have cut its last tokens off.
        """
