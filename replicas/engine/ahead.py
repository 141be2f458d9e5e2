"""Segments begun before the output of the one before them is known: as long as they may come to be, then as
they have come to be. Pure.

A device works on a step while the host prepares the next (engine.scheduler). What the next verifies, and from
where on, is decided on the device by the rule of `settled` (replicas.kernels.follow); the host, once it has
the output, applies the same rule to it. None of that bears on the tokens, since every verify of the right
seed is AR's. So a segment may well verify past an end of text that its sequence then has.
"""

from dataclasses import replace

from policies.modes import DecodePlan, Mode
from replicas.engine.batch import ModelSpec, Segment, SegmentOutput
from replicas.engine.decoders.round import SegmentRequest
from replicas.engine.decoders.self_speculation import masks_behind, num_worth_verifying, with_draft
from replicas.engine.decoders.verify import verify

UNKNOWN = 0
"""Stands for a token that the device is still to say."""


class Worth:
    """How much of a sequence's next draft is going to be worth verifying, as far as its last ones tell.

    A segment begun ahead has rows for what may be worth it, and rows that come to nothing cost as much as
    others. So they are half as many again as were used last, and half as many where a verify was refused;
    those behind a verify, which may be, are told from those behind a step, which can't.
    """

    def __init__(self) -> None:
        self._last: dict[bool, int] = {}

    def most(self, before: Segment) -> int:
        """The number of drafted tokens to have rows for, where they are drafted behind `before`."""
        last = self._last.get(before.num_checked > 1, before.num_drafted)
        return min(before.num_drafted, last + last // 2 + 1)

    def note(self, before: Segment, is_accepted: bool, count: int) -> None:
        """Notes what has come of a segment: whether all that was checked was accepted, and how many of the
        tokens drafted behind were then verified."""
        if before.num_drafted:
            self._last[before.num_checked > 1] = count if is_accepted else self.most(before) // 2


def next_start(before: Segment) -> int:
    """The position at the least of the token that follows a segment's first checked one."""
    return before.start + before.wanted[0] + 1


def open_request(
    before: Segment, num_remaining: int, worth: Worth, plan: DecodePlan, spec: ModelSpec
) -> SegmentRequest | None:
    """The longest segment that a sequence may want after `before`, which brings a token or more.

    num_remaining: tokens that it may still generate, those of `before` among them

    None where it can't be told, and where its sequence will have ended or may reach the context's end.
    """
    num_left = num_remaining - 1
    room = spec.max_context - (next_start(before) + before.num_checked - 1)
    if num_left < 1 or room < 1:
        return None
    if plan.mode is Mode.AR:
        return verify((UNKNOWN,))
    if plan.mode is not Mode.SELF_SPECULATION:
        return None
    assert spec.mask_token_id is not None, "a model without a mask token has only the mode ar"
    tokens = (UNKNOWN,) * min(plan.block_length, num_left, room, 1 + worth.most(before))
    block_length = min(plan.block_length, room - len(tokens))
    return with_draft(verify(tokens), masks_behind(block_length, num_left - 1, spec.mask_token_id))


def settled(segment: Segment, output: SegmentOutput) -> Segment | None:
    """What a segment that follows another has come to be, by that one's output.

    Its causal tokens are the other's first token that does not agree with what was drafted for its place, or
    the last, and behind the last, where all agree, what is worth verifying of the new draft.

    None where the output is not whole: something could not be sampled, and what the device has made of that
    is of no use.
    """
    before = segment.follows
    assert before is not None
    if len(output.token_ids) < len(before.wanted):
        return None
    num_checked = before.num_checked
    first = before.wanted[0] + 1
    drafted = before.token_ids[first : first + num_checked - 1]
    agree = (own == token for own, token in zip(output.token_ids, drafted, strict=False))
    num_accepted = next((at for at, agrees in enumerate(agree) if not agrees), num_checked - 1)
    tokens = output.token_ids[num_accepted : num_accepted + 1]
    if num_accepted == num_checked - 1:
        end = num_checked + segment.num_causal - 1
        count = num_worth_verifying(output.probs[num_checked:end])
        tokens = output.token_ids[num_accepted : num_checked + count]
    masks = segment.token_ids[segment.num_causal :]
    request = with_draft(verify(tokens), masks)
    return replace(
        segment,
        start=segment.start + num_accepted,
        token_ids=request.token_ids,
        num_causal=request.num_causal,
        wanted=request.wanted,
        follows=None,
    )


def request_of(segment: Segment) -> SegmentRequest:
    """The request of a settled segment."""
    return SegmentRequest(segment.token_ids, segment.num_causal, segment.adapter, segment.wanted)
