"""Autoregressive decoding: one causal forward of the seed gives the next seed.

What a grammar forces behind the seed goes with it, so that it takes no forward of its own. It is verified,
since a text that is forced may be cut into tokens in several ways, of which the model has its own.
"""

from policies.modes import Mode
from replicas.engine.decoders.verify import VerifyRound, verify


class ArRound(VerifyRound):
    """forced: the tokens that are to come behind the seed, as far as can be told"""

    mode = Mode.AR

    def __init__(self, start: int, seed: int, forced: tuple[int, ...] = ()):
        super().__init__(start, verify((seed, *forced)))
