"""Guesses the next step's segments where they follow from this one's tokens alone. Pure.

An AR step is followed by one of the token it gives, which needs no host to be planned, so the runner may
start it while the host still commits this step. Only the host can tell what follows a forward of the other
modes: how much of a draft is accepted, and how sure the next one is, decide where the next segment begins and
how long it is. The engine is free to ask for something else: a sequence may end, others may come. What was
started is then dropped; its K/V lies past what counts as cached and is overwritten before it could.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from replicas.engine.batch import Segment

_UNKNOWN = 0


@dataclass(frozen=True, slots=True)
class Guess:
    """The segments that the next step is expected to ask for."""

    segments: tuple[Segment, ...]
    """The expected segments, of one token each, yet unknown and so 0."""
    sources: tuple[int, ...]
    """For each of them the row among this step's outputs that gives its token."""


def guess(segments: Sequence[Segment], first_outputs: Sequence[int], page_size: int) -> Guess | None:
    """The guess of the step after this one; None unless every segment's successor is known.

    first_outputs: for each segment the first of its rows among the step's outputs
    """
    following = []
    for segment in segments:
        sampling = segment.sampling
        if sampling.has_penalties or sampling.has_masks or not segment.wanted:
            return None  # what may come next, and with what penalty, is the host's to say
        start = segment.start + 1
        if len(segment.token_ids) > 1 or not segment.is_causal or start >= len(segment.pages) * page_size:
            return None  # its page may not be allocated yet
        following.append(replace(segment, start=start, token_ids=(_UNKNOWN,)))
    return Guess(tuple(following), tuple(first_outputs))


def resolve(guessed: Guess, token_ids: Sequence[int]) -> dict[int, tuple[int, Segment]]:
    """The guessed segments with the tokens that they had, by sequence, each with its index in the guess.

    token_ids: all of the step's outputs
    """
    return {
        segment.seq_id: (index, replace(segment, token_ids=(token_ids[source],)))
        for index, (segment, source) in enumerate(zip(guessed.segments, guessed.sources, strict=True))
    }


def match(known: dict[int, tuple[int, Segment]], segments: Sequence[Segment]) -> list[int] | None:
    """The index of the guess for each segment asked for; None unless all were guessed."""
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
