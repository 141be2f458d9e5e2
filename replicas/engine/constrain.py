"""Applies a sequence's grammar to the segment that it wants next."""

import logging
from collections.abc import Sequence as Seq

from replicas.engine.decoders.round import SegmentRequest
from replicas.engine.grammar import GrammarFailed
from replicas.engine.sequence import Sequence

logger = logging.getLogger(__name__)


def constrained(
    sequence: Sequence, request: SegmentRequest
) -> tuple[SegmentRequest, tuple[bytes | None, ...]]:
    """The request without the drafts that the grammar refuses, and a mask for each causal token
    sampled, None where it may be anything.

    Without a grammar it is the request as it is, and no masks, but while a prompt is scored. A grammar that
    fails leaves its word in `sequence.failure`.
    """
    if sequence.is_scored:
        return request, _scoring(sequence, request)
    if sequence.grammar is None or not request.num_causal or not request.wanted:
        return request, ()
    first = request.wanted[0]
    allowed = _masks(sequence, request.token_ids[first + 1 : request.num_causal])
    if all(mask is None for mask in allowed):
        return request, ()
    return request.cut(first + len(allowed)), allowed


def _scoring(sequence: Sequence, request: SegmentRequest) -> tuple[bytes | None, ...]:
    """Masks of a chunk of a prompt that is scored: the one token that comes next is what may be sampled.

    So the sampler reports its probability. After the last one comes the completion's first.
    """
    begin = sequence.num_cached + 1
    following = sequence.tokens[begin : begin + len(request.token_ids)]
    masks = [bytes(token // 8) + bytes((1 << token % 8,)) for token in following]
    if len(masks) == len(request.token_ids):
        return tuple(masks)
    return (*masks, *((None,) if sequence.grammar is None else _masks(sequence, ())[:1]))


def _masks(sequence: Sequence, draft: Seq[int]) -> tuple[bytes | None, ...]:
    """The grammar's masks; none, and its word in `sequence.failure`, where it fails."""
    assert sequence.grammar is not None
    try:
        return sequence.grammar.masks(draft)
    except GrammarFailed as error:
        sequence.failure = f"the grammar of {sequence.sampling.grammar_field} can't go on: {error}"
    except Exception as error:
        logger.exception("the grammar of request %s raised", sequence.request_id)
        field = sequence.sampling.grammar_field
        sequence.failure = f"the grammar of {field} can't go on ({type(error).__name__})"
    return ()
