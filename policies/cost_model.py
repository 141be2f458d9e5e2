"""The default policy, `cost_model`: the plan that should bring most, by each replica's own measurements."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from policies.forecast import Forecast, forecast
from policies.modes import LOSSLESS_MODES, MAX_BLOCK_LENGTH, DecodePlan, Mode
from policies.policy import Decision, ExploredPlans, Policy, PolicyParameters, Snapshot
from policies.replica_load import ReplicaLoad

NOISE = 0.35
"""The relative difference up to which two loads may still be the same load."""
SMOOTHED_S = 0.5
"""The time constant of the average of the loads."""
LASTING_S = 0.15
"""The time for which a change larger than noise must last to count: requests that end together and come
again at once are no change."""
WORTH_EXPLORING = 0.7
"""The share of the best plan's worth that a plan must be able to bring to be explored now and then."""
HOPE = 4.0
"""The relative amount by which a plan that never ran may exceed expectations: priors are that wrong."""
FEW_ROUNDS = 3.0
"""The number of rounds below which a plan worth exploring is explored more eagerly."""
EAGER = 5.0
"""The factor on the share of exploring forwards while a plan worth exploring has had under FEW_ROUNDS."""


class CostModelParameters(PolicyParameters):
    """The parameters of CostModelPolicy."""

    quality: Literal["any", "lossless"] = "any"
    """The modes of `auto` requests: `any` lets them run every mode, and diffusion's answers may differ from
    `ar`'s; `lossless` keeps them to `ar` and `self_speculation`, whose answers are the same. A request's own
    `lossless` holds either way."""
    threshold: float = Field(default=0.9, gt=0.0, le=1.0)
    """Diffusion's threshold. Its forwards fall and its errors rise as the threshold falls, so the bound on
    quality is also the fastest plan, and the only one considered."""
    diffusion_gain: float = Field(default=0.05, ge=0.0)
    """The gain over the best lossless plan that diffusion must bring to be chosen (0.05 is 5 %)."""
    speculation_blocks: tuple[int, ...] = (4, 8, 16, 32)
    """The block lengths of self-speculation that are considered."""
    diffusion_blocks: tuple[int, ...] = (8, 16, 32)
    """The block lengths of diffusion that are considered."""
    explore: float = Field(default=0.02, ge=0.0, le=0.1)
    """The share of a replica's forwards that explore plans which do not run but are not far behind, or not
    well known; EAGER times that while one is hardly known at all; 0 explores nothing."""

    @field_validator("speculation_blocks", "diffusion_blocks")
    @classmethod
    def _are_block_lengths(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 2 <= block <= MAX_BLOCK_LENGTH for block in blocks):
            raise ValueError(f"block lengths are 2 to {MAX_BLOCK_LENGTH}")
        return tuple(sorted(set(blocks)))

    def candidates(self, modes: tuple[Mode, ...]) -> list[DecodePlan]:
        """Returns the plans that a model with these modes may run, `ar` first."""
        plans = [DecodePlan(Mode.AR)]
        if Mode.SELF_SPECULATION in modes:
            plans += [DecodePlan(Mode.SELF_SPECULATION, block) for block in self.speculation_blocks]
        if Mode.DIFFUSION in modes and self.quality == "any":
            plans += [DecodePlan(Mode.DIFFUSION, block, self.threshold) for block in self.diffusion_blocks]
        return plans


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A replica's number of `auto` requests without its noise."""

    num_auto: float
    at_s: float
    """The time as of which the number holds."""
    changed_s: float | None = None
    """The time since when the load's own number has differed by more than noise; None if it does not."""


class CostModelPolicy(Policy[Smoothed | None]):
    """Chooses the plan of most goodput by policies.forecast; `stabilise` keeps noise from shifting it."""

    name = "cost_model"
    Parameters = CostModelParameters

    def __init__(self, parameters: CostModelParameters):
        super().__init__(parameters)
        self._bounds = parameters

    def resume(self, current: DecodePlan | None, held_s: float, now_s: float) -> None:
        return None

    def decide(self, snapshot: Snapshot, state: Smoothed | None, now_s: float) -> tuple[Decision, Smoothed]:
        load, current = snapshot.load, snapshot.current
        state = _smooth(state, load.num_auto, now_s)
        candidates = self._bounds.candidates(load.modes)
        forecasts = [forecast(load, plan, state.num_auto) for plan in candidates]
        scores = {f.plan: self._score(load, f, is_running=f.plan == current) for f in forecasts}
        best = max(forecasts, key=lambda expected: scores[expected.plan])
        if not load.num_auto and load.num_in_flight and current in scores:
            return Decision(current, "only pinned requests run", 0.0), state
        # A plan that no candidate is, as another policy or other parameters leave it, is just left.
        gain = None
        if current in scores:
            gain = _gain(scores[best.plan], scores[current])
        return Decision(best.plan, _reason(load, forecasts), gain), state

    def explored_plans(self, load: ReplicaLoad, running: DecodePlan) -> ExploredPlans | None:
        """Returns each plan that may be near the best, so that no estimate is stale for ever at little loss.

        A plan may bring up to 1 + HOPE times what is expected of it, the less the more of its rounds have
        been seen lately. A plan that no request may run is left out: the others would wait for its turn.
        """
        if not self._bounds.explore or load.costs is None or load.num_auto == 0:
            return None
        modes = load.modes
        if load.num_lossless >= load.num_auto:
            modes = tuple(mode for mode in modes if mode in LOSSLESS_MODES)
        candidates = self._bounds.candidates(modes)
        worths = {plan: self._worth(forecast(load, plan)) for plan in candidates}
        least = WORTH_EXPLORING * max(worths.values())
        num_rounds = {plan: load.costs.yield_of(plan).num_rounds for plan in candidates}
        num_rounds[candidates[0]] = math.inf  # ar's yield is never in doubt
        plans = tuple(
            plan
            for plan in candidates
            if plan != running and worths[plan] * (1.0 + HOPE / (1.0 + num_rounds[plan])) >= least
        )
        if not plans:
            return None
        is_eager = min(num_rounds[plan] for plan in plans) < FEW_ROUNDS
        return ExploredPlans(plans, self._bounds.explore * (EAGER if is_eager else 1.0))

    def _score(self, load: ReplicaLoad, expected: Forecast, is_running: bool) -> tuple[float, float]:
        """Returns a plan's score: plans compare by its first number, where that is equal by its second."""
        return 0.0, self._worth(expected)

    def _worth(self, expected: Forecast) -> float:
        """Returns the tokens a second expected, for diffusion less the gain that it must bring."""
        if expected.plan.mode in LOSSLESS_MODES:
            return expected.tokens_per_s
        return expected.tokens_per_s / (1.0 + self._bounds.diffusion_gain)


def _smooth(state: Smoothed | None, num_auto: int, now_s: float) -> Smoothed:
    """Averages noise out; a change larger than noise is taken as it is once it lasts, or if none ran."""
    if state is None or state.num_auto < 1.0:
        return Smoothed(float(num_auto), now_s)
    if abs(num_auto - state.num_auto) > NOISE * max(num_auto, state.num_auto):
        changed_s = now_s if state.changed_s is None else state.changed_s
        if now_s - changed_s >= LASTING_S:
            return Smoothed(float(num_auto), now_s)
        return Smoothed(state.num_auto, now_s, changed_s)
    fresh = 1.0 - math.exp(-max(0.0, now_s - state.at_s) / SMOOTHED_S)
    return Smoothed(state.num_auto + fresh * (num_auto - state.num_auto), now_s)


def _gain(best: tuple[float, float], current: tuple[float, float]) -> float:
    if best[0] != current[0]:
        return (best[0] - current[0]) / max(1.0, current[0])
    return best[1] / current[1] - 1.0


def _reason(load: ReplicaLoad, forecasts: list[Forecast]) -> str:
    """Returns the reason of a decision: the load, and the best plan of each mode, the fastest first."""
    by_mode: dict[Mode, Forecast] = {}
    for expected in sorted(forecasts, key=lambda entry: -entry.tokens_per_s):
        by_mode.setdefault(expected.plan.mode, expected)
    compared = ", ".join(
        f"{entry.tokens_per_s:.0f} in {mode} {entry.plan.block_length}" for mode, entry in by_mode.items()
    )
    unknown = "" if load.costs is not None else " (nothing measured yet)"
    return f"{load.num_in_flight} in flight, {load.num_auto} auto; tokens/s expected{unknown}: {compared}"
