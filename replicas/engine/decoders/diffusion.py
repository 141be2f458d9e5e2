"""Block diffusion: bidirectional forwards fix a block's positions, then one causal forward commits it.

Each denoising forward fixes, of the positions still masked, the most confident one and every other
whose top probability reaches the threshold (Fast-dLLM's confidence-aware parallel decoding, arXiv
2505.22618). Fixed positions never change, so the fixed prefix streams before the block is complete.

Where a block follows, its masks go behind the commit in the same forward, which is its first denoising: each
block costs a forward less. That one denoising is done with the seed still masked, since the commit is what
gives it.
"""

from collections.abc import Sequence as Seq
from collections.abc import Set

from policies.modes import Mode
from replicas.engine.batch import SegmentOutput
from replicas.engine.decoders.round import Round, RoundProgress, SegmentRequest


class DiffusionRound(Round):
    """A round over one block.

    seed: None while the block before, which gives it, is not committed.
    eos_token_ids: the tokens that end a text; empty when the request ignores them.
    max_steps: denoising forwards at most; the last one fixes every position still masked.
    adapter: whether it is on while denoising; the commit never has it.
    """

    mode = Mode.DIFFUSION

    def __init__(
        self,
        start: int,
        seed: int | None,
        block_length: int,
        threshold: float,
        mask_token_id: int,
        eos_token_ids: Set[int],
        max_steps: int,
        adapter: bool,
    ):
        self.start = start
        self._threshold = threshold
        self._mask_token_id = mask_token_id
        self._eos_token_ids = eos_token_ids
        self._max_steps = self._steps_left = max_steps
        self._adapter = adapter
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
            self._mask_token_id,
            self._eos_token_ids,
            self._max_steps,
            self._adapter,
        )
        behind = successor.next_segment().token_ids
        wanted = (length - 1, *range(length + 1, length + following))
        return SegmentRequest(tokens + behind, length, adapter=False, wanted=wanted, successor=successor)

    def apply_output(self, request: SegmentRequest, output: SegmentOutput) -> RoundProgress:
        if self._masked:
            return RoundProgress(self._denoised(output.token_ids, output.probs))
        seed, *guesses = output.token_ids
        tokens: tuple[int, ...] = (seed,)
        if request.successor is not None:
            assert isinstance(request.successor, DiffusionRound)
            tokens += request.successor.begin(seed, guesses, output.probs[1:])
        return RoundProgress(tokens, num_cached=len(self._block), done=True)

    def begin(self, seed: int, guesses: Seq[int], probs: Seq[float]) -> tuple[int, ...]:
        """Takes the seed, and the first denoising, which was done while it was masked; returns the final
        tokens.

        guesses, probs: of every position after the seed
        """
        self._block[0] = seed
        return self._denoised(guesses, probs)

    @property
    def _masked(self) -> tuple[int, ...]:
        return tuple(index for index, token in enumerate(self._block) if token is None)

    @property
    def _tokens(self) -> tuple[int, ...]:
        return tuple(self._mask_token_id if token is None else token for token in self._block)

    def _denoised(self, token_ids: Seq[int], probs: Seq[float]) -> tuple[int, ...]:
        """Fixes some masked positions by what a denoising forward said of them; returns the final tokens."""
        masked = self._masked
        self._steps_left -= 1
        best = max(range(len(masked)), key=lambda k: probs[k])
        for k, index in enumerate(masked):
            if k == best or probs[k] >= self._threshold or self._steps_left <= 0:
                self._block[index] = token_ids[k]
        return tuple(self._take_final())

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
