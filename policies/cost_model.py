"""The default policy, `cost_model`: the plan that should bring most, by each replica's own measurements."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from policies.cost import ReplicaCosts, prior_yield
from policies.fixed import check_one_bound
from policies.forecast import Forecast, forecast
from policies.modes import LOSSLESS_MODES, MAX_BLOCK_LENGTH, MAX_FACTOR, DecodePlan, Mode
from policies.policy import Decision, Policy, PolicyParameters, Snapshot, Trial
from policies.quality import QualityBound, plans_within
from policies.replica_load import ReplicaLoad

LOOKS = 5
"""The number of looks, 0.2 s apart, whose median is the load: a change counts once most of them show it."""
LEAP = 3.0
"""The ratio to that median from which a change is none that noise makes: it counts once two looks show it."""
OPTIMISM = 2.0
"""The standard deviations by which a plan may exceed what is expected of it, and is tried for that."""
WORTH_TRYING = 0.05
"""The gain on the best plan that must be possible for a trial."""
MIN_LOSS = 0.1
"""The share of a trial's tokens that is lost at the least, as far as is known beforehand."""


_OF_DIFFUSION = frozenset({"threshold", "factor", "diffusion_gain", "diffusion_blocks"})


class CostModelParameters(PolicyParameters):
    """The parameters of CostModelPolicy."""

    quality: Literal["any", "lossless"] | QualityBound = "lossless"
    """The modes of `auto` requests: `lossless` keeps them to `ar` and `self_speculation`, whose answers are
    the same; `any` lets them run every mode, and diffusion's answers may differ from `ar`'s; a bound on how
    many may differ adds the settings of diffusion that keep it, as measured of the checkpoint. A request's
    own `lossless` or bound holds either way."""
    threshold: float | None = Field(default=None, gt=0.0, le=1.0)
    """Diffusion's threshold. Its forwards fall and its errors rise as the threshold falls, so it is also the
    fastest that is acceptable, and the only one considered."""
    factor: float | None = Field(default=None, gt=0.0, le=MAX_FACTOR)
    """Diffusion's factor, in place of a threshold; without either the checkpoint's own sampler chooses, or
    without one the default factor (policies.modes); where quality is a bound any that keeps it."""
    diffusion_gain: float = Field(default=0.05, ge=0.0)
    """The gain over the best lossless plan that diffusion must bring to be chosen (0.05 is 5 %)."""
    speculation_blocks: tuple[int, ...] = (4, 8, 16, 32)
    """The block lengths of self-speculation that are considered."""
    diffusion_blocks: tuple[int, ...] = (8, 16, 32)
    """The block lengths of diffusion that are considered."""
    explore: float = Field(default=0.02, ge=0.0, le=0.1)
    """The largest share of a replica's tokens that is lost by trials of plans that may be better than is
    known; 0 tries nothing."""

    @field_validator("speculation_blocks", "diffusion_blocks")
    @classmethod
    def _are_block_lengths(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 2 <= block <= MAX_BLOCK_LENGTH for block in blocks):
            raise ValueError(f"block lengths are 2 to {MAX_BLOCK_LENGTH}")
        return tuple(sorted(set(blocks)))

    @model_validator(mode="after")
    def _fits_together(self) -> "CostModelParameters":
        check_one_bound(self.threshold, self.factor)
        unused = self.model_fields_set & _OF_DIFFUSION
        if unused and self.quality == "lossless":
            raise ValueError(
                f"{min(unused)} is of diffusion, which runs only where quality is any or a bound"
            )
        return self

    def candidates(
        self, modes: tuple[Mode, ...], costs: ReplicaCosts | None = None, risk: float | None = None
    ) -> list[DecodePlan]:
        """Returns the plans that a model with these modes may run, `ar` first.

        costs: say which settings of diffusion keep a bound on quality. risk: of the checkpoint's sampler;
        None where it has none.
        """
        plans = [DecodePlan(Mode.AR)]
        if Mode.SELF_SPECULATION in modes:
            plans += [DecodePlan(Mode.SELF_SPECULATION, block) for block in self.speculation_blocks]
        if Mode.DIFFUSION in modes and self.quality != "lossless":
            plans += self._diffusions(costs, risk)
        return plans

    def _diffusions(self, costs: ReplicaCosts | None, risk: float | None) -> list[DecodePlan]:
        is_set = self.threshold is not None or self.factor is not None
        setting = (self.threshold, self.factor) if is_set else (None, None, risk)
        plans = [DecodePlan(Mode.DIFFUSION, block, *setting) for block in self.diffusion_blocks]
        if not isinstance(self.quality, QualityBound):
            return plans
        kept = plans_within(self.quality.max_differing, () if costs is None else costs.yields)
        if is_set:
            return [plan for plan in plans if plan in kept]
        # One a block, and by priors, which stay as they are: which plans are considered must not flicker.
        quickest = sorted(kept, key=lambda plan: -prior_yield(plan).forwards)
        by_block = {plan.block_length: plan for plan in quickest}
        return [by_block[block] for block in self.diffusion_blocks if block in by_block]


class CostModelPolicy(Policy[tuple[float, ...]]):
    """Chooses the plan of most goodput by policies.forecast; `stabilise` keeps noise from shifting it.

    Its memory of a replica is the number of clients with `auto` requests at the last looks.
    """

    name = "cost_model"
    Parameters = CostModelParameters

    def __init__(self, parameters: CostModelParameters):
        super().__init__(parameters)
        self._bounds = parameters

    def resume(self, current: DecodePlan | None, held_s: float, now_s: float) -> tuple[float, ...]:
        return ()

    def decide(
        self, snapshot: Snapshot, state: tuple[float, ...], now_s: float
    ) -> tuple[Decision, tuple[float, ...]]:
        load, current = snapshot.load, snapshot.current
        num_auto = load.num_auto_clients
        state = (*state, num_auto)[-LOOKS:] if num_auto else ()
        num_auto = _smoothed(state)
        forecasts = [
            forecast(load, plan, num_auto)
            for plan in self._bounds.candidates(load.modes, load.costs, load.risk)
        ]
        scores = {f.plan: self._score(load, f, is_running=f.plan == current) for f in forecasts}
        best = max(forecasts, key=lambda expected: scores[expected.plan])
        if not load.num_auto and load.num_in_flight and current in scores:
            return Decision(current, "only pinned requests run", 0.0), state
        # A plan that no candidate is, as another policy or other parameters leave it, is just left.
        gain = None
        if current in scores:
            gain = _gain(scores[best.plan], scores[current])
        return Decision(best.plan, _reason(load, forecasts), gain), state

    def trial(self, load: ReplicaLoad, running: DecodePlan) -> Trial | None:
        """Returns the plan that may exceed the best one by most, if any may by enough.

        A plan that no request may run is left out.
        """
        if not self._bounds.explore or load.costs is None or load.num_auto == 0:
            return None
        modes = load.modes
        if load.num_lossless >= load.num_auto:
            modes = tuple(mode for mode in modes if mode in LOSSLESS_MODES)
        forecasts = [forecast(load, plan) for plan in self._bounds.candidates(modes, load.costs, load.risk)]
        best = max(map(self._worth, forecasts))
        others = [expected for expected in forecasts if expected.plan != running]
        tried = max(others, key=self._hope, default=None)
        if tried is None or self._hope(tried) < best * (1.0 + WORTH_TRYING):
            return None
        loss = max(MIN_LOSS, 1.0 - self._worth(tried) / best)
        now = forecast(load, running)
        return Trial(tried.plan, loss, self._bounds.explore, max(_first_round_s(tried), _first_round_s(now)))

    def _hope(self, expected: Forecast) -> float:
        return self._worth(expected) * math.exp(OPTIMISM * expected.spread)

    def _score(self, load: ReplicaLoad, expected: Forecast, is_running: bool) -> tuple[float, float]:
        """Returns a plan's score: plans compare by its first number, where that is equal by its second."""
        return 0.0, self._worth(expected)

    def _worth(self, expected: Forecast) -> float:
        """Returns the tokens a second of clients who wait, for diffusion less the gain it must bring."""
        if expected.plan.mode in LOSSLESS_MODES:
            return expected.awaited_tokens_per_s
        return expected.awaited_tokens_per_s / (1.0 + self._bounds.diffusion_gain)


def _first_round_s(expected: Forecast) -> float:
    """Returns the time in which a plan's first rounds bring next to nothing: self-speculation has no draft
    yet, and diffusion a block to begin. So it is lost once a trial, before it or behind it."""
    return 0.0 if expected.plan.mode is Mode.AR else expected.round_s


def _smoothed(looks: Sequence[float]) -> float:
    """Returns the number of clients by the last looks at it, 0 without any."""
    if not looks:
        return 0.0
    median = statistics.median(looks)
    low, high = sorted(looks[-2:]) if len(looks) > 1 else (median, median)
    if low >= LEAP * median:
        return low
    return high if high * LEAP <= median else median


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
