"""Guesses the next step's segments where they follow from this one's tokens alone. Pure.

An AR step is followed by one of the token it gives, a draft by the verify of the tokens it gives, a verify by
a draft that begins where it stopped accepting. None needs the host to be planned, so the runner may start
them while the host still commits this step. Only the host can tell what follows a forward of diffusion, which
includes a block's commit with the next block behind it. The engine is free to ask for something else: a
sequence may end, others may come. What was started is then dropped; its K/V lies past what counts as cached
and is overwritten before it could.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from replicas.engine.batch import Segment

_UNKNOWN = 0


@dataclass(frozen=True, slots=True)
class Guess:
    """The segments that the next step is expected to ask for."""

    segments: tuple[Segment, ...]
    """The expected segments, with tokens yet unknown as 0."""
    sources: tuple[int, ...]
    """For each of their tokens, in order, the row among this step's outputs that gives it, -1 where it is
    known already. The bonus tokens, one a segment, count as rows past the outputs."""
    drafts: tuple[tuple[int, ...] | None, ...]
    """For each segment the draft that this step verifies, None where it verifies nothing. Such a segment
    begins here at its draft's start, to be moved on by the accepted tokens and one."""
    first_outputs: tuple[int, ...]
    """For each segment the first of its rows among this step's outputs."""

    @property
    def max_added(self) -> tuple[int, ...]:
        """For each segment the most positions by which it may begin past its start."""
        return tuple(0 if draft is None else len(draft) + 1 for draft in self.drafts)


def guess(
    segments: Sequence[Segment],
    first_outputs: Sequence[int],
    num_outputs: int,
    page_size: int,
    mask_token_id: int | None,
) -> Guess | None:
    """The guess of the step after this one; None unless every segment's successor is known.

    first_outputs: for each segment the first of its rows among the step's outputs, num_outputs in all
    """
    following = []
    sources: list[int] = []
    drafts: list[tuple[int, ...] | None] = []
    for number, (segment, first) in enumerate(zip(segments, first_outputs, strict=True)):
        sampling = segment.sampling
        if sampling.has_penalties or sampling.needs_grammar or not segment.wanted:
            return None  # what may come next, and with what penalty, is the host's to say
        length = len(segment.token_ids)
        drafts.append(None)
        if segment.is_causal and length == 1:
            start = segment.start + 1
            if start >= len(segment.pages) * page_size:
                return None  # its page is not allocated yet
            following.append(replace(segment, start=start, token_ids=(_UNKNOWN,)))
            sources.append(first)
        elif segment.adapter and segment.wanted == tuple(range(1, length)):
            token_ids = (segment.token_ids[0], *[_UNKNOWN] * (length - 1))
            wanted = tuple(range(length))
            following.append(
                replace(segment, token_ids=token_ids, num_causal=length, adapter=False, wanted=wanted)
            )
            sources.extend((-1, *range(first, first + length - 1)))
        elif segment.is_causal and segment.wanted == tuple(range(length)) and mask_token_id is not None:
            if sampling.temperature > 0:
                return None  # the random numbers belong to positions that the host does not know
            if not _has_room(segment, page_size):
                return None
            token_ids = (_UNKNOWN, *[mask_token_id] * (length - 1))
            wanted = tuple(range(1, length))
            following.append(replace(segment, token_ids=token_ids, num_causal=0, adapter=True, wanted=wanted))
            sources.extend((num_outputs + number, *[-1] * (length - 1)))
            drafts[-1] = segment.token_ids[1:]
        else:
            return None
    return Guess(tuple(following), tuple(sources), tuple(drafts), tuple(first_outputs))


def _has_room(verify: Segment, page_size: int) -> bool:
    """True if the next draft can be as long wherever this one stops, by its pages and by max_tokens."""
    length = len(verify.token_ids)
    end = verify.start + 2 * length
    max_tokens = verify.sampling.max_tokens
    return end <= len(verify.pages) * page_size and (
        max_tokens is None or end + 1 - verify.prompt_len <= max_tokens
    )


def resolve(guessed: Guess, token_ids: Sequence[int]) -> dict[int, tuple[int, Segment]]:
    """The guessed segments with the tokens that they had, by sequence, each with its index in the guess.

    token_ids: all of the step's outputs
    """
    counts = [
        None if draft is None else _num_accepted(draft, token_ids[first:])
        for draft, first in zip(guessed.drafts, guessed.first_outputs, strict=True)
    ]
    bonus = [
        token_ids[first + (count or 0)] for first, count in zip(guessed.first_outputs, counts, strict=True)
    ]
    made = [*token_ids, *bonus]
    known = {}
    at = 0
    for index, (segment, count) in enumerate(zip(guessed.segments, counts, strict=True)):
        sources = guessed.sources[at : at + len(segment.token_ids)]
        at += len(sources)
        tokens = tuple(
            token if source < 0 else made[source]
            for token, source in zip(segment.token_ids, sources, strict=True)
        )
        start = segment.start if count is None else segment.start + count + 1
        known[segment.seq_id] = (index, replace(segment, start=start, token_ids=tokens))
    return known


def _num_accepted(draft: Sequence[int], tokens: Sequence[int]) -> int:
    return next((i for i, token in enumerate(draft) if token != tokens[i]), len(draft))


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
