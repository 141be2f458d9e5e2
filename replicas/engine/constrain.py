"""Applies a sequence's grammar to the segment that it wants next."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq

from replicas.engine.decoders.round import NO_DRAFT, Draft, SegmentRequest
from replicas.engine.grammar import Grammar, GrammarFailed
from replicas.engine.sequence import Sequence

logger = logging.getLogger(__name__)

Masks = tuple[bytes | None, ...]
"""As of engine.batch.Segment.allowed."""


def constrained(sequence: Sequence, request: SegmentRequest) -> tuple[SegmentRequest, Masks]:
    """The request without the drafts that the grammar refuses, and a mask for each causal token
    sampled, None where it may be anything.

    Without a grammar it is the request as it is, and no masks, but where the tokens that follow are known. A
    grammar that fails leaves its word in `sequence.failure`.
    """
    if sequence.is_scored:
        begin = sequence.num_cached + 1
        following = sequence.tokens[begin : begin + len(request.token_ids)]
        return request, _telling(sequence, following, len(request.token_ids), ())
    if request.is_given:
        following = list(request.token_ids[1 : request.num_causal])
        return request, _telling(sequence, following, request.num_causal, following)
    if sequence.grammar is None or not request.num_causal or not request.wanted:
        return request, ()
    first, draft = request.wanted[0], request.token_ids
    allowed = _asked(sequence, lambda grammar: grammar.masks(draft[first + 1 : request.num_causal]))
    if all(mask is None for mask in allowed):
        return request, ()
    return request.cut(first + len(allowed)), allowed


def with_forced(sequence: Sequence, draft: Draft, most: int) -> Draft:
    """The draft of what follows a sequence's seed, in which what its grammar forces takes the place of what
    that refuses, and follows the rest; of `most` tokens at most."""
    if sequence.grammar is None:
        return draft
    tokens: tuple[int, ...] = ()
    probs: tuple[float, ...] = ()
    try:
        while len(tokens) < most:
            left = draft.token_ids[len(tokens) : most]
            count = sequence.grammar.num_allowed((*tokens, *left)) if left else len(tokens)
            probs += draft.probs[len(tokens) : count]
            tokens += left[: count - len(tokens)]
            forced = sequence.grammar.forced(tokens)[: most - len(tokens)]
            if not forced:
                break
            tokens += forced
            probs += (1.0,) * len(forced)
    except Exception:  # of which the masks, asked for next, tell
        return NO_DRAFT
    return Draft(tokens, probs)


def _telling(sequence: Sequence, following: Seq[int], num_rows: int, untold: Seq[int]) -> Masks:
    """Masks of rows whose tokens are known: the one token that follows is what may be sampled.

    So the sampler reports its probability. After the last one comes a token that is not known, if there are
    so many rows.

    untold: what the grammar has not accepted before that one.
    """
    masks = tuple(bytes(token // 8) + bytes((1 << token % 8,)) for token in following)
    if len(masks) == num_rows:
        return masks
    if sequence.grammar is None:
        return (*masks, None)
    return masks + _asked(sequence, lambda grammar: (grammar.mask_behind(untold),))


def _asked(sequence: Sequence, question: Callable[[Grammar], Masks]) -> Masks:
    """The grammar's masks; none, and its word in `sequence.failure`, where it fails."""
    assert sequence.grammar is not None
    try:
        return question(sequence.grammar)
    except GrammarFailed as error:
        sequence.failure = failure_of(sequence, error)
    except Exception as error:
        logger.exception("the grammar of request %s raised", sequence.request_id)
        field = sequence.sampling.grammar_field
        sequence.failure = f"the grammar of {field} can't go on ({type(error).__name__})"
    return ()


def failure_of(sequence: Sequence, error: GrammarFailed) -> str:
    """The reason why a sequence ends whose grammar has failed."""
    return f"the grammar of {sequence.sampling.grammar_field} can't go on: {error}"
