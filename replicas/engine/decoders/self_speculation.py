"""Self-speculation: each forward verifies a draft causally and drafts the next tokens behind it.

Verification samples every position as AR would, with AR's random number for that position, and
keeps what agrees with the draft plus the first that does not. So the output is AR's token for token,
at temperature 0 and, given the seed, above it too: accepting a draft d exactly when AR's own sample
x ~ p equals d is speculative sampling (Leviathan et al., arXiv 2211.17192) with a point-mass draft.

The masks of the next draft stand behind the verified tokens, bidirectional, in the same forward. They bet
that all of these are accepted: when they are, the next round has its draft already. Else it has none,
verifies the seed alone, which is an AR step, and drafts anew. So a round is one forward and never brings less
than AR's token.

Such a draft is made before its own seed is known, the token after the verified ones, which is masked in it
too.
"""

from collections.abc import Sequence as Seq
from collections.abc import Set
from dataclasses import replace

from policies.modes import Mode
from replicas.engine.decoders.round import Draft, SegmentRequest
from replicas.engine.decoders.verify import VerifyRound, verify

PROB_ONE = 1 << 20
"""A probability of 1 where probabilities are reckoned with in whole numbers."""


class SelfSpeculationRound(VerifyRound):
    """A round of one forward.

    request: as verify_and_draft makes it
    """

    mode = Mode.SELF_SPECULATION


def verify_and_draft(
    seed: int,
    draft: Draft,
    block_length: int,
    num_remaining: int,
    mask_token_id: int,
    eos_token_ids: Set[int],
) -> SegmentRequest:
    """The segment of a round: what is worth verifying of a draft, and the masks of the next.

    draft: of the tokens after the seed, as the round before has left it
    block_length: tokens verified at most, the seed included; as many are drafted behind them, the first of
    which, the next seed, is not used
    num_remaining: tokens that the request may still generate, at least 1
    eos_token_ids: the tokens that end a text; empty when the request ignores them
    """
    most = min(block_length, num_remaining) - 1
    ends = (at for at, token in enumerate(draft.token_ids[:most], start=1) if token in eos_token_ids)
    most = next(ends, most)
    tokens = (seed, *draft.token_ids[: num_worth_verifying(draft.probs[:most])])
    num_left = 0 if tokens[-1] in eos_token_ids else num_remaining - len(tokens)
    return with_draft(verify(tokens), masks_behind(block_length, num_left, mask_token_id))


def with_draft(request: SegmentRequest, masks: tuple[int, ...]) -> SegmentRequest:
    """The request with the masks of a draft behind its tokens."""
    if not masks:
        return request
    first = len(request.token_ids)
    wanted = (*request.wanted, *range(first + 1, first + len(masks)))
    return replace(request, token_ids=request.token_ids + masks, adapter=True, wanted=wanted)


def masks_behind(block_length: int, num_remaining: int, mask_token_id: int) -> tuple[int, ...]:
    """The masks of a draft: of the next seed, then of the tokens after it; none where the text ends before.

    num_remaining: tokens that the request may still generate from the next seed on, this included
    """
    count = min(block_length, num_remaining)
    return (mask_token_id,) * count if count > 1 else ()


def num_worth_verifying(probs: Seq[float]) -> int:
    """The number of drafted tokens to verify; the rest is drafted again behind them.

    The one of most tokens expected of the forward, less what a refusal costs: the next forward then has no
    draft, and brings one token instead of what a draft like this one brings.

    Reckoned in whole numbers, so that a device that decides it too (replicas.kernels.follow) can't come to
    another one by its rounding.

    probs: of each token, that it is accepted if those before it are
    """
    survivals = [PROB_ONE]
    for prob in probs:
        survivals.append(survivals[-1] * int(prob * PROB_ONE) // PROB_ONE)
    full = sum(survivals[1:])
    best = best_value = expected = 0
    for count, survival in enumerate(survivals):
        expected += survival if count else 0
        value = expected * PROB_ONE - (PROB_ONE - survival) * full
        if value >= best_value:
            best, best_value = count, value
    return best
