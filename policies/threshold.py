"""The `threshold` policy: the operator's table of plans by the number of requests in flight."""

import math
from itertools import pairwise

from pydantic import Field, model_validator

from policies.fixed import PlanParameters
from policies.modes import DecodePlan, Mode, available_plan
from policies.policy import Decision, Policy, PolicyParameters, Snapshot


class Level(PlanParameters):
    """A plan that runs while at most max_in_flight requests run or wait at the replica."""

    max_in_flight: int = Field(ge=0)


class ThresholdParameters(PolicyParameters):
    """The parameters of ThresholdPolicy."""

    levels: tuple[Level, ...] = (
        Level(max_in_flight=2, mode=Mode.DIFFUSION, block_length=16),
        Level(max_in_flight=8, mode=Mode.SELF_SPECULATION, block_length=8),
    )
    """The levels, by rising max_in_flight."""
    above: PlanParameters = PlanParameters(mode=Mode.AR)
    """The plan past the last level."""
    band: float = Field(default=0.35, ge=0.0, lt=1.0)
    """The hysteresis: a level is come back to only at or below (1 - band) of its max_in_flight, in whole
    requests. From 1/3 up no noise of 20 % around any load crosses both edges."""

    @model_validator(mode="after")
    def _levels_rise(self) -> "ThresholdParameters":
        if any(low.max_in_flight >= high.max_in_flight for low, high in pairwise(self.levels)):
            raise ValueError("levels must have rising max_in_flight")
        return self

    def return_limit(self, max_in_flight: int) -> int:
        """Returns the most requests in flight at which a level is come back to.

        It is never 0 where the level admits a request at all: a client that sends one request after
        another is hardly ever seen with none, and the level would be left for good.
        """
        return max(min(1, max_in_flight), math.floor(max_in_flight * (1.0 - self.band)))


class ThresholdPolicy(Policy[None]):
    """Chooses the level of the load; levels whose mode the model lacks give way to the next one up."""

    name = "threshold"
    Parameters = ThresholdParameters

    def __init__(self, parameters: ThresholdParameters):
        super().__init__(parameters)
        self._table = parameters

    def resume(self, current: DecodePlan | None, held_s: float, now_s: float) -> None:
        return None

    def decide(self, snapshot: Snapshot, state: None, now_s: float) -> tuple[Decision, None]:
        load = snapshot.load
        num = load.num_in_flight
        levels = [level for level in self._table.levels if level.mode in load.modes]
        limits = [level.max_in_flight for level in levels]
        plans = [level.decode_plan(load.risk) for level in levels]
        plans.append(available_plan(self._table.above.decode_plan(load.risk), load.modes))

        index = _first_at_least(limits, num)
        current = _index_of(snapshot.current, plans)
        if current is not None and index < current:
            # Downwards the narrower limits hold, and never push a replica up.
            index = min(current, _first_at_least([self._table.return_limit(n) for n in limits], num))
        return Decision(plans[index], _reason(num, limits, index)), None


def _first_at_least(limits: list[int], num: int) -> int:
    return next((index for index, limit in enumerate(limits) if num <= limit), len(limits))


def _index_of(current: DecodePlan | None, plans: list[DecodePlan]) -> int | None:
    """Returns the level that a replica is on, by mode alone where another table or policy chose its plan."""
    if current is None:
        return None
    if current in plans:
        return plans.index(current)
    return next((index for index, plan in enumerate(plans) if plan.mode is current.mode), None)


def _reason(num: int, limits: list[int], index: int) -> str:
    above = f"above {limits[index - 1]}" if index else ""
    up_to = f"up to {limits[index]}" if index < len(limits) else ""
    level = ", ".join(part for part in (above, up_to) if part) or "any load"
    # Inside the band the count is not in its level's own range, and the reason should not say it is.
    held = index and num <= limits[index - 1]
    return f"{num} in flight; {'still ' if held else ''}on the level {level}"
