"""Block diffusion: bidirectional forwards fix a block's positions, then one causal forward commits it.

Each denoising forward fixes, of the positions still masked, the most confident one and every other whose top
probability reaches the threshold, or as many as a factor lets it (Fast-dLLM's confidence-aware parallel
decoding, arXiv 2505.22618). Fixed positions never change, so the fixed prefix streams before the block is
complete.

Where a block follows, its masks go behind the commit in the same forward, which is its first denoising, as
those of the first block go behind the prompt: each block costs a forward less. That one denoising is done
with the seed still masked, since the forward is what gives it; and so it is where a block has to begin in a
forward of its own, since the tokens must not depend on that.
"""

from collections.abc import Sequence as Seq
from collections.abc import Set
from dataclasses import replace

from policies.modes import Mode
from replicas.engine.batch import SegmentOutput
from replicas.engine.decoders.round import Round, RoundProgress, SegmentRequest


class DiffusionRound(Round):
    """A round over one block.

    seed: None while the block before, or the prompt, which gives it, is not committed.
    eos_token_ids: the tokens that end a text; empty when the request ignores them.
    threshold, factor: as of policies.modes.DecodePlan
    max_steps: denoising forwards at most; the last one fixes every position still masked.
    adapter: whether it is on while denoising; what is committed never has it.
    hides_seed: whether the first denoising is done with the seed masked, though it is known.
    """

    mode = Mode.DIFFUSION

    def __init__(
        self,
        start: int,
        seed: int | None,
        block_length: int,
        threshold: float | None,
        factor: float | None,
        mask_token_id: int,
        eos_token_ids: Set[int],
        max_steps: int,
        adapter: bool,
        hides_seed: bool,
    ):
        self.start = start
        self._threshold, self._factor = threshold, factor
        self._mask_token_id = mask_token_id
        self._eos_token_ids = eos_token_ids
        self._max_steps = self._steps_left = max_steps
        self._adapter = adapter
        self._hides_seed = hides_seed
        self._block: list[int | None] = [seed] + [None] * (block_length - 1)
        self._num_final = 1  # the seed and the fixed tokens right after it

    def next_segment(self, following: int = 0) -> SegmentRequest:
        tokens = self._tokens
        if masked := self._masked:
            return SegmentRequest(tokens, num_causal=0, adapter=self._adapter, wanted=masked)
        length = len(tokens)
        if not following:
            return SegmentRequest(tokens, num_causal=length, adapter=False, wanted=(length - 1,))
        successor = DiffusionRound(
            self.start + length,
            None,
            following,
            self._threshold,
            self._factor,
            self._mask_token_id,
            self._eos_token_ids,
            self._max_steps,
            self._adapter,
            self._hides_seed,
        )
        return successor.behind(SegmentRequest(tokens, length, adapter=False, wanted=(length - 1,)))

    def apply_output(self, request: SegmentRequest, output: SegmentOutput) -> RoundProgress:
        if self._masked:
            return RoundProgress(self._denoised(output.token_ids, output.probs))
        tokens = output.token_ids[:1]
        if request.successor is not None:
            tokens = request.successor.begin(output)
        return RoundProgress(tokens, num_cached=len(self._block), done=True)

    def behind(self, request: SegmentRequest) -> SegmentRequest:
        """The request, whose last token gives this round's seed, with this block's masks behind it."""
        first, (masks, masked) = len(request.token_ids), (self._tokens, self._masked)
        wanted = (*request.wanted, *(first + index for index in masked if index))
        return replace(
            request, token_ids=request.token_ids + masks, adapter=self._adapter, wanted=wanted, successor=self
        )

    def begin(self, output: SegmentOutput) -> tuple[int, ...]:
        seed, *guesses = output.token_ids
        self._block[0] = seed
        return seed, *self._denoised(guesses, output.probs[1:])

    @property
    def _masked(self) -> tuple[int, ...]:
        return tuple(index for index, token in enumerate(self._block) if token is None)

    @property
    def _tokens(self) -> tuple[int, ...]:
        tokens = [self._mask_token_id if token is None else token for token in self._block]
        if self._hides_seed and self._steps_left == self._max_steps and len(tokens) > 1:
            tokens[0] = self._mask_token_id
        return tuple(tokens)

    def _denoised(self, token_ids: Seq[int], probs: Seq[float]) -> tuple[int, ...]:
        """Fixes some masked positions by what a denoising forward said of them; returns the final tokens.

        It may have said nothing of the last ones, or of all, where nothing could be sampled from a row.
        """
        masked = self._masked[: len(token_ids)]
        self._steps_left -= 1
        surest = sorted(range(len(masked)), key=lambda k: -probs[k])
        count = len(masked) if self._steps_left <= 0 else max(1, self._num_sure([probs[k] for k in surest]))
        for k in surest[:count]:
            self._block[masked[k]] = token_ids[k]
        return tuple(self._take_final())

    def _num_sure(self, probs: Seq[float]) -> int:
        """The number of positions to fix of those with these probabilities, the highest first."""
        threshold, factor = self._threshold, self._factor
        if threshold is not None:
            return sum(prob >= threshold for prob in probs)
        assert factor is not None
        ranked = enumerate(probs, start=1)
        return max((count for count, p in ranked if (count + 1) * (1.0 - p) < factor), default=0)

    def _take_final(self) -> list[int]:
        """The tokens that have become final: up to the first mask, or through an end of text.

        After an end of text nothing more is taken: the sequence ends there.
        """
        taken: list[int] = []
        while self._num_final < len(self._block):
            token = self._block[self._num_final]
            if token is None:
                break
            taken.append(token)
            self._num_final += 1
            if token in self._eos_token_ids:
                break
        return taken
