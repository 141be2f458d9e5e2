"""Block diffusion: bidirectional forwards fix a block's positions, then one causal forward commits it.

Each denoising forward fixes, of the positions still masked, the most confident one and every other
whose top probability reaches the threshold (Fast-dLLM's confidence-aware parallel decoding, arXiv
2505.22618). Fixed positions never change, so the fixed prefix streams before the block is complete.
"""

from collections.abc import Set

from policies.modes import Mode
from replicas.engine.decoders.round import Advance, Ask, Round
from replicas.engine.plan import SegmentOutput


class DiffusionRound(Round):
    """eos_token_ids: what ends a text; empty when the request ignores it.

    max_steps: denoising forwards at most; the last one fixes every position still masked.
    adapter: whether it is on while denoising; the commit never has it.
    """

    mode = Mode.DIFFUSION

    def __init__(
        self,
        start: int,
        seed: int,
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
        self._steps_left = max_steps
        self._adapter = adapter
        self._block: list[int | None] = [seed] + [None] * (block_length - 1)
        self._num_final = 1  # the seed and the fixed tokens right after it

    @property
    def _masked(self) -> tuple[int, ...]:
        return tuple(index for index, token in enumerate(self._block) if token is None)

    def ask(self) -> Ask:
        masked = self._masked
        tokens = tuple(self._mask_token_id if token is None else token for token in self._block)
        if masked:
            return Ask(tokens, causal=False, adapter=self._adapter, wanted=masked)
        return Ask(tokens, causal=True, adapter=False, wanted=(len(tokens) - 1,))

    def advance(self, output: SegmentOutput) -> Advance:
        masked = self._masked
        if not masked:
            return Advance(output.token_ids, num_cached=len(self._block), done=True)
        self._steps_left -= 1
        best = max(range(len(masked)), key=lambda k: output.probs[k])
        for k, index in enumerate(masked):
            if k == best or output.probs[k] >= self._threshold or self._steps_left <= 0:
                self._block[index] = output.token_ids[k]
        return Advance(tuple(self._take_final()))

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
