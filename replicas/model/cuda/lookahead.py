"""Which segments the next step will ask for, where they follow from this one's tokens alone. Pure.

An AR step is followed by one of the token it gives, a draft by the verify of the tokens it gives. Neither
needs the host to be planned, so the runner may start them while the host still commits this step. The
engine is free to ask for something else: a sequence may end, others may come. What was started is then
dropped; its K/V lies past what counts as cached and is overwritten before it could.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from replicas.engine.plan import Segment

_UNKNOWN = 0


@dataclass(frozen=True, slots=True)
class Guess:
    """segments: what comes next, with tokens yet unknown as 0.

    sources: for each token of them, in order, the row among this step's outputs that gives it, or -1
        where the token itself is known.
    """

    segments: tuple[Segment, ...]
    sources: tuple[int, ...]


def guess(segments: Sequence[Segment], first_outputs: Sequence[int], page_size: int) -> Guess | None:
    """None unless every segment's successor is known.

    first_outputs: for each segment where its rows begin among the step's outputs.
    """
    following = []
    sources: list[int] = []
    for segment, first in zip(segments, first_outputs, strict=True):
        sampling = segment.sampling
        if sampling.has_penalties or not segment.wanted:
            return None
        length = len(segment.token_ids)
        if segment.causal and length == 1:
            start = segment.start + 1
            if start >= len(segment.pages) * page_size:
                return None  # its page is not allocated yet
            following.append(replace(segment, start=start, token_ids=(_UNKNOWN,)))
            sources.append(first)
        elif segment.adapter and segment.wanted == tuple(range(1, length)):
            token_ids = (segment.token_ids[0], *[_UNKNOWN] * (length - 1))
            following.append(
                replace(segment, token_ids=token_ids, causal=True, adapter=False, wanted=tuple(range(length)))
            )
            sources.extend((-1, *range(first, first + length - 1)))
        else:
            return None
    return Guess(tuple(following), tuple(sources))


def resolve(guessed: Guess, token_ids: Sequence[int]) -> dict[int, tuple[int, Segment]]:
    """By sequence: the index of its guessed segment, and the segment with the tokens that it had.

    token_ids: the outputs that the sources number.
    """
    known = {}
    at = 0
    for index, segment in enumerate(guessed.segments):
        sources = guessed.sources[at : at + len(segment.token_ids)]
        at += len(sources)
        tokens = tuple(
            token if source < 0 else token_ids[source]
            for token, source in zip(segment.token_ids, sources, strict=True)
        )
        known[segment.seq_id] = (index, replace(segment, token_ids=tokens))
    return known


def match(known: dict[int, tuple[int, Segment]], segments: Sequence[Segment]) -> list[int] | None:
    """For each segment asked for the index of its guess; None unless all were guessed."""
    found = []
    for segment in segments:
        index, expected = known.get(segment.seq_id, (-1, None))
        # Pages may have been added since; those of the guess must still be its own.
        if expected is None or segment != replace(expected, pages=segment.pages):
            return None
        if segment.pages[: len(expected.pages)] != expected.pages:
            return None
        found.append(index)
    return found
