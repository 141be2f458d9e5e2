"""The estimator of what forecasts leave out: the rates that plans made, against those that were foretold.

What is decided is which plan makes more tokens a second, and of the plan in force that is seen. So what no
formula has in it, as the door's share of the cores, or texts, is learned as a factor: a common one, which
follows in seconds and cancels out of comparisons, and one a mode and octave of load, which lasts.
"""

import math
from collections.abc import Mapping

from policies.cost import ModeFactors
from policies.factors import Prior
from policies.forecast import forecast
from policies.mode_factors import ModeFactorsEstimator
from policies.modes import DecodePlan, Mode
from policies.replica_load import ReplicaLoad

COMMON = Prior(spread=0.5, lasting_s=10.0)
"""What all forecasts of the moment leave out."""
OF_MODE = Prior(spread=0.1, lasting_s=600.0)
"""What a mode's leave out at any load."""
OF_OCTAVE = Prior(spread=0.1, lasting_s=600.0)
"""What a mode's leave out beside that at 2^n requests."""
NOISE = 0.15
"""The standard deviation of the log of one span's ratio."""
SPAN_S = 0.6
"""The time over which a rate is taken: some rounds of every mode."""
NUM_OCTAVES = 11
"""Octaves of load: 1 to 1,024 clients."""


class RateEstimator:
    """Estimates by which factors the rates made differ from the rates foretold.

    now_s: any clock that moves forward, the same one for all calls. known: learned before, as `factors` is.
    """

    def __init__(self, now_s: float, known: Mapping[Mode, ModeFactors] | None = None):
        self._learned = ModeFactorsEstimator(COMMON, OF_MODE, OF_OCTAVE, None, NUM_OCTAVES, now_s, known)
        self._plan: DecodePlan | None = None
        self._seen_s = now_s
        self._num_seen = self._num_tried = 0
        self._rate = 0.0  # foretold for the last load
        self._num_clients = 0
        self._begin()

    @property
    def common(self) -> float:
        """The logarithm of the factor that all plans' forecasts lack now."""
        return round(self._learned.common, 4)

    @property
    def factors(self) -> dict[Mode, ModeFactors]:
        """The factors of each mode that ran in force, by octaves of clients."""
        return self._learned.factors

    def update(self, load: ReplicaLoad, num_tokens: int, num_tried: int, now_s: float) -> None:
        """Learns from the time since the last call.

        load: now, with the plan in force, its costs without what this estimates. num_tokens: made since the
        start. num_tried: forwards in trials since the start.
        """
        elapsed_s, made = now_s - self._seen_s, num_tokens - self._num_seen
        is_tried, self._num_tried = num_tried != self._num_tried, num_tried
        self._seen_s, self._num_seen = now_s, num_tokens
        plan = load.decode
        if plan is None or plan != self._plan or is_tried or elapsed_s > SPAN_S:
            self._plan = plan
            self._begin()
        elif self._foresee(load, plan):
            self._made += made
            self._foretold += elapsed_s * self._rate
            self._clients += elapsed_s * self._num_clients
            self._elapsed_s += elapsed_s
            if self._elapsed_s >= SPAN_S and made > 0:  # a long step's tokens are of all its time
                self._end(plan, now_s)
        else:
            self._begin()

    def _foresee(self, load: ReplicaLoad, plan: DecodePlan) -> bool:
        """Notes the rate foretold for a load; False where what is made then would tell nothing of it."""
        if load.num_clients == 0:
            return False
        self._rate, self._num_clients = forecast(load, plan).tokens_per_s, load.num_clients
        return load.num_auto == load.num_in_flight and not (load.num_lossless and plan.mode is Mode.DIFFUSION)

    def _end(self, plan: DecodePlan, now_s: float) -> None:
        """Learns from a whole span."""
        self._learned.advance(now_s)
        log = math.log(self._made / self._foretold)
        self._learned.observe(plan.mode, self._clients / self._elapsed_s, log, NOISE)
        self._begin()

    def _begin(self) -> None:
        self._made = 0
        self._foretold = self._clients = self._elapsed_s = 0.0
