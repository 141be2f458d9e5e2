"""Autoregressive decoding: one causal forward of the seed gives the next seed."""

from policies.modes import Mode
from replicas.engine.decoders.round import Advance, Ask, Round
from replicas.engine.plan import SegmentOutput


class ArRound(Round):
    mode = Mode.AR

    def __init__(self, start: int, seed: int):
        self.start = start
        self._seed = seed

    def ask(self, following: int = 0) -> Ask:
        return Ask((self._seed,), num_causal=1, adapter=False, wanted=(0,))

    def advance(self, output: SegmentOutput) -> Advance:
        return Advance(output.token_ids, output.logprobs(1), num_cached=1, done=True)
