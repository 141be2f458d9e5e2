"""What every decoder is: a round, from one safe point to the next.

At a safe point all tokens of a sequence but the last, the seed, have their K/V cached. A round says
which segment it wants next, is given that segment's output, and in the end leaves the sequence at
its next safe point. The scheduler knows nothing of modes beyond this interface.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from policies.modes import Mode
from replicas.engine.plan import SegmentOutput, TokenLogprob


@dataclass(frozen=True, slots=True)
class Ask:
    """The segment a round wants, from the seed's position on; fields as in engine.plan.Segment."""

    token_ids: tuple[int, ...]
    num_causal: int
    adapter: bool
    wanted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Advance:
    """What a segment's output did.

    tokens: newly final tokens, to be appended to the sequence and streamed.
    logprobs: of these tokens, where the request asks for them; else empty.
    num_cached: how many tokens from the seed on now have valid K/V; 0 until the round's end.
    done: whether the round is over: the sequence is at its next safe point, or in the successor.
    successor: the round that this one has begun already.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached: int = 0
    done: bool = False
    successor: "Round | None" = None


class Round(ABC):
    """start: the seed's position."""

    mode: Mode
    start: int

    @abstractmethod
    def ask(self, following: int = 0) -> Ask:
        """following: the length of the block that is to follow this one, where it may be begun in the same
        forward; the last ask before advance() counts."""

    @abstractmethod
    def advance(self, output: SegmentOutput) -> Advance: ...
