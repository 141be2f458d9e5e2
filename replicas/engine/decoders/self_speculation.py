"""Self-speculation: one bidirectional forward drafts a block, one causal forward verifies it.

Verification samples every position as AR would, with AR's random number for that position, and
keeps what agrees with the draft plus the first that does not. So the output is AR's token for token,
at temperature 0 and, given the seed, above it too: accepting a draft d exactly when AR's own sample
x ~ p equals d is speculative sampling (Leviathan et al., arXiv 2211.17192) with a point-mass draft.
"""

from policies.modes import Mode
from replicas.engine.batch import SegmentOutput
from replicas.engine.decoders.round import Round, RoundProgress, SegmentRequest


class SelfSpeculationRound(Round):
    """A round of block_length 1 has nothing to draft and is an AR step."""

    mode = Mode.SELF_SPECULATION

    def __init__(self, start: int, seed: int, block_length: int, mask_token_id: int):
        self.start = start
        self._seed = seed
        self._masks = (mask_token_id,) * (block_length - 1)
        self._draft: tuple[int, ...] | None = None if self._masks else ()

    def next_segment(self, following: int = 0) -> SegmentRequest:
        if self._draft is None:
            wanted = tuple(range(1, 1 + len(self._masks)))
            return SegmentRequest((self._seed, *self._masks), num_causal=0, adapter=True, wanted=wanted)
        tokens = (self._seed, *self._draft)
        return SegmentRequest(tokens, num_causal=len(tokens), adapter=False, wanted=tuple(range(len(tokens))))

    def apply_output(self, request: SegmentRequest, output: SegmentOutput) -> RoundProgress:
        if self._draft is None:
            self._draft = output.token_ids
            return RoundProgress()
        num_accepted = 0
        num_verified = len(output.token_ids) - 1  # fewer than were drafted where a grammar refuses the rest
        while num_accepted < num_verified and self._draft[num_accepted] == output.token_ids[num_accepted]:
            num_accepted += 1
        # The seed and the accepted drafts are cached; the token after them, AR's own, is the next seed.
        count = num_accepted + 1
        return RoundProgress(output.token_ids[:count], output.logprobs(count), num_cached=count, done=True)
