"""Applies a sequence's grammar to the segment that it wants next."""

import logging

from replicas.engine.decoders.round import SegmentRequest
from replicas.engine.grammar import GrammarFailed
from replicas.engine.sequence import Sequence

logger = logging.getLogger(__name__)


def constrained(sequence: Sequence, request: SegmentRequest) -> tuple[SegmentRequest, tuple[bytes, ...]]:
    """The request without the drafts that the grammar refuses, and a mask for each causal token sampled.

    Without a grammar it is the request as it is, and no masks. A grammar that fails leaves its word in
    `sequence.failure`.
    """
    if sequence.grammar is None or not request.num_causal or not request.wanted:
        return request, ()
    first = request.wanted[0]
    try:
        allowed = sequence.grammar.masks(request.token_ids[first + 1 : request.num_causal])
    except GrammarFailed as error:
        sequence.failure = f"the grammar of response_format can't go on: {error}"
        return request, ()
    except Exception as error:
        logger.exception("the grammar of request %s raised", sequence.request_id)
        sequence.failure = f"the grammar of response_format can't go on ({type(error).__name__})"
        return request, ()
    return request.cut(first + len(allowed)), allowed
