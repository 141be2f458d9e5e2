"""Autoregressive decoding: one causal forward of the seed gives the next seed."""

from policies.modes import Mode
from replicas.engine.batch import SegmentOutput
from replicas.engine.decoders.round import Round, RoundProgress, SegmentRequest


class ArRound(Round):
    mode = Mode.AR

    def __init__(self, start: int, seed: int):
        self.start = start
        self._seed = seed

    def next_segment(self, following: int = 0) -> SegmentRequest:
        return SegmentRequest((self._seed,), num_causal=1, adapter=False, wanted=(0,))

    def apply_output(self, request: SegmentRequest, output: SegmentOutput) -> RoundProgress:
        return RoundProgress(output.token_ids, output.logprobs(1), num_cached=1, done=True)
