"""What a grammar leaves of a segment that a sequence asks for."""

import logging

from replicas.engine.decoders.round import Ask
from replicas.engine.grammar import GrammarFailed
from replicas.engine.sequence import Sequence

logger = logging.getLogger(__name__)


def constrained(sequence: Sequence, ask: Ask) -> tuple[Ask, tuple[bytes, ...]]:
    """With a grammar: the ask without drafts that may not come, and what each sampled token may be.

    A grammar that fails leaves its word in `sequence.failure`.
    """
    if sequence.grammar is None or not ask.num_causal or not ask.wanted:
        return ask, ()
    first = ask.wanted[0]
    try:
        allowed = sequence.grammar.masks(ask.token_ids[first + 1 :])
    except GrammarFailed as error:
        sequence.failure = f"the grammar of response_format can't go on: {error}"
        return ask, ()
    except Exception as error:
        logger.exception("the grammar of request %s raised", sequence.request_id)
        sequence.failure = f"the grammar of response_format can't go on ({type(error).__name__})"
        return ask, ()
    kept = len(allowed)
    token_ids = ask.token_ids[: first + kept]
    return Ask(token_ids, len(token_ids), ask.adapter, ask.wanted[:kept]), allowed
