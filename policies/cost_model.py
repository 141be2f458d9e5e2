"""The default policy: run what is expected to bring most, by what each replica has measured of itself."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from policies.forecast import Forecast, forecast
from policies.load import ReplicaLoad
from policies.modes import LOSSLESS_MODES, MAX_BLOCK_LENGTH, DecodePlan, Mode
from policies.policy import Decision, Policy, PolicyParameters, Probes, Snapshot

NOISE = 0.35
"""A load this much below another, relatively, may still be the same load."""
SMOOTHED_S = 0.5
WORTH_TRYING = 0.7
"""A plan that may bring at least so much of what the best one is expected to is tried now and then."""


class CostModelParameters(PolicyParameters):
    """quality: `any` lets `auto` requests run every mode, and diffusion's answers may differ from `ar`'s;
    `lossless` keeps them to `ar` and `self_speculation`, whose answers are the same. A request's own
    `lossless` holds either way.

    threshold: diffusion's. Its forwards fall and its errors rise as the threshold falls, so the
    bound on quality is also the fastest plan, and the only one considered.
    diffusion_gain: how much more diffusion must bring than the best lossless plan to be chosen
    (0.05 is 5 %).
    speculation_blocks, diffusion_blocks: the block lengths considered.
    explore: the share of a replica's forwards that go into trying plans which do not run but are not
    far behind, or not well known; 0 tries nothing.
    """

    quality: Literal["any", "lossless"] = "any"
    threshold: float = Field(default=0.9, gt=0.0, le=1.0)
    diffusion_gain: float = Field(default=0.05, ge=0.0)
    speculation_blocks: tuple[int, ...] = (4, 8, 16, 32)
    diffusion_blocks: tuple[int, ...] = (8, 16, 32)
    explore: float = Field(default=0.02, ge=0.0, le=0.1)

    @field_validator("speculation_blocks", "diffusion_blocks")
    @classmethod
    def _are_block_lengths(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 2 <= block <= MAX_BLOCK_LENGTH for block in blocks):
            raise ValueError(f"block lengths are 2 to {MAX_BLOCK_LENGTH}")
        return tuple(sorted(set(blocks)))

    def candidates(self, modes: tuple[Mode, ...]) -> list[DecodePlan]:
        """The plans that a model with these modes may run, `ar` first."""
        plans = [DecodePlan(Mode.AR)]
        if Mode.SELF_SPECULATION in modes:
            plans += [DecodePlan(Mode.SELF_SPECULATION, block) for block in self.speculation_blocks]
        if Mode.DIFFUSION in modes and self.quality == "any":
            plans += [DecodePlan(Mode.DIFFUSION, block, self.threshold) for block in self.diffusion_blocks]
        return plans


@dataclass(frozen=True, slots=True)
class Smoothed:
    """num_auto: the load's, without its noise, as of at_s."""

    num_auto: float
    at_s: float


class CostModelPolicy(Policy[Smoothed | None]):
    """Goodput by policies.forecast, with `stabilise` around it to keep noise from shifting anything."""

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
        # A plan that no candidate is, as another policy or other parameters leave it, is just left.
        gain = None
        if current in scores:
            gain = _gain(scores[best.plan], scores[current])
        return Decision(best.plan, _reason(load, forecasts), gain), state

    def probes(self, load: ReplicaLoad, running: DecodePlan) -> Probes | None:
        """Each plan that may be near the best: so no estimate is stale for ever, and little is lost.

        What a plan may bring is up to twice what is expected of it, the less the more of its rounds
        have been seen lately.
        """
        if not self._bounds.explore or load.costs is None or load.num_auto == 0:
            return None
        candidates = self._bounds.candidates(load.modes)
        worths = {plan: self._worth(forecast(load, plan)) for plan in candidates}
        least = WORTH_TRYING * max(worths.values())
        hopes = {plan: 1.0 + 1.0 / (1.0 + load.costs.yield_of(plan).num_rounds) for plan in candidates}
        hopes[candidates[0]] = 1.0  # ar's yield is never in doubt
        plans = tuple(p for p in candidates if p != running and worths[p] * hopes[p] >= least)
        return Probes(plans, self._bounds.explore) if plans else None

    def _score(self, load: ReplicaLoad, expected: Forecast, is_running: bool) -> tuple[float, float]:
        """Plans are compared by the first number, and where it is the same by the second."""
        return 0.0, self._worth(expected)

    def _worth(self, expected: Forecast) -> float:
        """Tokens a second, less what diffusion must bring more."""
        if expected.plan.mode in LOSSLESS_MODES:
            return expected.tokens_per_s
        return expected.tokens_per_s / (1.0 + self._bounds.diffusion_gain)


def _smooth(state: Smoothed | None, num_auto: int, now_s: float) -> Smoothed:
    """Noise is averaged out; a change larger than noise is taken at once."""
    if state is None or abs(num_auto - state.num_auto) > NOISE * max(num_auto, state.num_auto):
        return Smoothed(float(num_auto), now_s)
    fresh = 1.0 - math.exp(-max(0.0, now_s - state.at_s) / SMOOTHED_S)
    return Smoothed(state.num_auto + fresh * (num_auto - state.num_auto), now_s)


def _gain(best: tuple[float, float], current: tuple[float, float]) -> float:
    if best[0] != current[0]:
        return (best[0] - current[0]) / max(1.0, current[0])
    return best[1] / current[1] - 1.0


def _reason(load: ReplicaLoad, forecasts: list[Forecast]) -> str:
    """With the best plan of each mode, the fastest first."""
    by_mode: dict[Mode, Forecast] = {}
    for expected in sorted(forecasts, key=lambda entry: -entry.tokens_per_s):
        by_mode.setdefault(expected.plan.mode, expected)
    compared = ", ".join(
        f"{entry.tokens_per_s:.0f} in {mode} {entry.plan.block_length}" for mode, entry in by_mode.items()
    )
    unknown = "" if load.costs is not None else " (nothing measured yet)"
    return f"{load.num_in_flight} in flight, {load.num_auto} auto; tokens/s expected{unknown}: {compared}"
