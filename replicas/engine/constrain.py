"""Applies a sequence's grammar to the segment that it wants next."""

import logging
from collections.abc import Sequence as Seq

from replicas.engine.decoders.round import SegmentRequest
from replicas.engine.grammar import GrammarFailed
from replicas.engine.sequence import Sequence

logger = logging.getLogger(__name__)


def constrained(
    sequence: Sequence, request: SegmentRequest, vocab_size: int
) -> tuple[SegmentRequest, tuple[bytes, ...]]:
    """The request without the drafts that the grammar refuses, and a mask for each causal token
    sampled.

    Without a grammar it is the request as it is, and no masks, but while a prompt is scored. A grammar that
    fails leaves its word in `sequence.failure`.
    """
    if sequence.is_scored:
        return request, _scoring(sequence, request, vocab_size)
    if sequence.grammar is None or not request.num_causal or not request.wanted:
        return request, ()
    first = request.wanted[0]
    allowed = _masks(sequence, request.token_ids[first + 1 : request.num_causal])
    if not allowed:
        return request, ()
    return request.cut(first + len(allowed)), allowed


def _scoring(sequence: Sequence, request: SegmentRequest, vocab_size: int) -> tuple[bytes, ...]:
    """Masks of a chunk of a prompt that is scored: the one token that comes next is what may be sampled.

    So the sampler reports its probability. After the last one comes the completion's first.
    """
    begin = sequence.num_cached + 1
    following = sequence.tokens[begin : begin + len(request.token_ids)]
    masks = [bytes(token // 8) + bytes((1 << token % 8,)) for token in following]
    if len(masks) == len(request.token_ids):
        return tuple(masks)
    any_token = (b"\xff" * (vocab_size // 8 + 1),)
    return (*masks, *(any_token if sequence.grammar is None else _masks(sequence, ())[:1]))


def _masks(sequence: Sequence, draft: Seq[int]) -> tuple[bytes, ...]:
    """The grammar's masks; none, and its word in `sequence.failure`, where it fails."""
    assert sequence.grammar is not None
    try:
        return sequence.grammar.masks(draft)
    except GrammarFailed as error:
        sequence.failure = f"the grammar of {_origin(sequence)} can't go on: {error}"
    except Exception as error:
        logger.exception("the grammar of request %s raised", sequence.request_id)
        sequence.failure = f"the grammar of {_origin(sequence)} can't go on ({type(error).__name__})"
    return ()


def _origin(sequence: Sequence) -> str:
    """The name of the field that asked for the grammar."""
    return "response_format" if sequence.sampling.tools is None else "tools"
