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
from replicas.engine.decoders.round import Advance, Ask, Round
from replicas.engine.plan import SegmentOutput


class DiffusionRound(Round):
    """seed: None until the block before is committed.

    eos_token_ids: what ends a text; empty when the request ignores it.

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
        self._successor: DiffusionRound | None = None

    @property
    def _masked(self) -> tuple[int, ...]:
        return tuple(index for index, token in enumerate(self._block) if token is None)

    @property
    def _tokens(self) -> tuple[int, ...]:
        return tuple(self._mask_token_id if token is None else token for token in self._block)

    def ask(self, following: int = 0) -> Ask:
        masked, tokens = self._masked, self._tokens
        if masked:
            return Ask(tokens, num_causal=0, adapter=self._adapter, wanted=masked)
        length = len(tokens)
        self._successor = self._next(following) if following else None
        wanted = (length - 1, *range(length + 1, length + following))
        behind = self._successor._tokens if self._successor is not None else ()
        return Ask(tokens + behind, num_causal=length, adapter=False, wanted=wanted)

    def _next(self, block_length: int) -> "DiffusionRound":
        return DiffusionRound(
            self.start + len(self._block),
            None,
            block_length,
            self._threshold,
            self._mask_token_id,
            self._eos_token_ids,
            self._max_steps,
            self._adapter,
        )

    def advance(self, output: SegmentOutput) -> Advance:
        masked = self._masked
        if masked:
            self._fix(masked, output.token_ids, output.probs)
            return Advance(tuple(self._take_final()))
        seed, *guesses = output.token_ids
        tokens = [seed]
        successor = self._successor
        if successor is not None:
            successor._block[0] = seed
            successor._fix(successor._masked, guesses, output.probs[1:])
            tokens += successor._take_final()
        return Advance(tuple(tokens), num_cached=len(self._block), done=True, successor=successor)

    def _fix(self, masked: Seq[int], token_ids: Seq[int], probs: Seq[float]) -> None:
        """What a denoising forward said of the masked positions."""
        self._steps_left -= 1
        best = max(range(len(masked)), key=lambda k: probs[k])
        for k, index in enumerate(masked):
            if k == best or probs[k] >= self._threshold or self._steps_left <= 0:
                self._block[index] = token_ids[k]

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
