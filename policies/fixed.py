"""The `fixed` policy: one mode, whatever the load."""

from pydantic import Field, model_validator

from policies.modes import DEFAULT_BLOCK_LENGTHS, MAX_FACTOR, DecodePlan, Mode, available_plan
from policies.policy import Decision, Policy, PolicyParameters, Snapshot


def check_one_bound(threshold: float | None, factor: float | None) -> None:
    """Raises ValueError where both of diffusion's bounds on doubt are given: only one could count."""
    if threshold is not None and factor is not None:
        raise ValueError("factor takes the place of threshold; give one of them")


class PlanParameters(PolicyParameters):
    """A plan as it is written in a configuration."""

    mode: Mode = Mode.AR
    block_length: int | None = None
    """Tokens a block; None for the mode's default."""
    threshold: float | None = Field(default=None, gt=0.0, le=1.0)
    factor: float | None = Field(default=None, gt=0.0, le=MAX_FACTOR)
    """Diffusion's factor, in place of a threshold; without either the checkpoint's own sampler chooses,
    or without one the default factor (policies.modes)."""

    @model_validator(mode="after")
    def _can_be_run(self) -> "PlanParameters":
        check_one_bound(self.threshold, self.factor)
        for bound in ("threshold", "factor"):
            if getattr(self, bound) is not None and self.mode is not Mode.DIFFUSION:
                raise ValueError(f"{bound} is diffusion's; leave it out with mode {self.mode}")
        self.decode_plan()
        return self

    def decode_plan(self, risk: float | None = None) -> DecodePlan:
        """Returns the plan at a replica.

        risk: of its checkpoint's sampler; None where that has none.
        """
        block_length = DEFAULT_BLOCK_LENGTHS[self.mode] if self.block_length is None else self.block_length
        if self.threshold is None and self.factor is None:
            return DecodePlan(self.mode, block_length, risk=risk)
        return DecodePlan(self.mode, block_length, self.threshold, self.factor)


class FixedPolicy(Policy[None]):
    """Runs one plan; a mode the model does not have gives way to the next more conservative one it has."""

    name = "fixed"
    Parameters = PlanParameters

    def __init__(self, parameters: PlanParameters):
        super().__init__(parameters)
        self._parameters = parameters

    def resume(self, current: DecodePlan | None, held_s: float, now_s: float) -> None:
        return None

    def decide(self, snapshot: Snapshot, state: None, now_s: float) -> tuple[Decision, None]:
        wanted = self._parameters.decode_plan(snapshot.load.risk)
        plan = available_plan(wanted, snapshot.load.modes)
        if plan == wanted:
            return Decision(plan, f"fixed to {plan.mode}"), None
        reason = f"fixed to {wanted.mode}, which this model lacks; {plan.mode} instead"
        return Decision(plan, reason), None
