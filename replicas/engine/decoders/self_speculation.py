"""Self-speculation: one bidirectional forward drafts a block, one causal forward verifies it.

Verification samples every position as AR would, with AR's random number for that position, and
keeps what agrees with the draft plus the first that does not. So the output is AR's token for token,
at temperature 0 and, given the seed, above it too: accepting a draft d exactly when AR's own sample
x ~ p equals d is speculative sampling (Leviathan et al., arXiv 2211.17192) with a point-mass draft.
"""

from policies.modes import Mode
from replicas.engine.decoders.round import Advance, Ask, Round
from replicas.engine.plan import SegmentOutput
from replicas.engine.speculation import Acceptance, Speculation


class SelfSpeculationRound(Round):
    """block_length 1 has nothing to draft and is an AR step.

    acceptance: the sequence's own estimate; like speculation's, the round tells it how it went.
    most: what the block could have been.
    """

    mode = Mode.SELF_SPECULATION

    def __init__(
        self,
        start: int,
        seed: int,
        block_length: int,
        mask_token_id: int,
        speculation: Speculation,
        acceptance: Acceptance,
        temperature: float,
        most: int,
    ):
        self.start = start
        self._most = most
        self._seed = seed
        self._masks = (mask_token_id,) * (block_length - 1)
        self._draft: tuple[int, ...] | None = None if self._masks else ()
        self._confidences: tuple[float, ...] = ()
        self._num_kept = 0
        self._speculation = speculation
        self._acceptance = acceptance
        self._temperature = temperature

    @property
    def shortened_to(self) -> int | None:
        length = 1 + self._num_kept
        return length if length < self._most else None

    def ask(self, following: int = 0) -> Ask:
        if self._draft is None:
            wanted = tuple(range(1, 1 + len(self._masks)))
            return Ask((self._seed, *self._masks), num_causal=0, adapter=True, wanted=wanted)
        tokens = (self._seed, *self._draft[: self._num_kept])
        return Ask(tokens, num_causal=len(tokens), adapter=False, wanted=tuple(range(len(tokens))))

    def survivals(self) -> tuple[float, ...]:
        return self._speculation.survivals(self._confidences, self._temperature)

    def keep(self, count: int) -> None:
        self._num_kept = count

    def advance(self, output: SegmentOutput) -> Advance:
        if self._draft is None:
            self._draft, self._confidences = output.token_ids, output.probs
            self._num_kept = len(self._draft)
            return Advance()
        num_accepted = 0
        most = len(output.token_ids) - 1  # fewer than were drafted where a grammar refuses the rest
        while num_accepted < most and self._draft[num_accepted] == output.token_ids[num_accepted]:
            num_accepted += 1
        if self._draft:
            self._speculation.learn(
                self._acceptance, self._confidences, num_accepted, self._num_kept, self._temperature
            )
        # The seed and the accepted drafts are cached; the token after them, AR's own, is the next seed.
        count = num_accepted + 1
        return Advance(output.token_ids[:count], output.logprobs(count), num_cached=count, done=True)
