"""Quality as a bound: the plans of diffusion whose answers are as often `ar`'s as is asked for.

The shares are those that `python -m training.evaluate --yields` has measured of the checkpoint
(policies.cost.RoundYield.differing): greedy answers to held-out prompts. A plan that was not measured keeps
no bound; the lossless modes keep every one.
"""

from collections.abc import Collection, Iterable

from pydantic import Field

from policies.cost import RoundYield
from policies.modes import DecodePlan, Mode, available_plan, lossless_plan
from policies.policy import PolicyParameters


class QualityBound(PolicyParameters):
    """A bound, as the parameters of a policy and a request's `decoding` have it."""

    max_differing: float = Field(gt=0.0, le=1.0, strict=True, allow_inf_nan=False)
    """The largest share of answers that may differ from `ar`'s (0.01 is 1 %)."""


def plans_within(max_differing: float, yields: Iterable[RoundYield]) -> tuple[DecodePlan, ...]:
    """Returns diffusion's plans whose measured answers keep a bound, those of most tokens a forward first."""
    kept = [
        entry
        for entry in yields
        if entry.plan.mode is Mode.DIFFUSION
        and entry.differing is not None
        and entry.differing <= max_differing
    ]
    return tuple(entry.plan for entry in sorted(kept, key=lambda entry: -entry.tokens_per_forward))


def bounded_plan(plan: DecodePlan, kept: tuple[DecodePlan, ...], modes: Collection[Mode]) -> DecodePlan:
    """Returns the plan that a request with a bound runs while the replica's plan is `plan`.

    It is the plan itself where that keeps the bound, else the first of `kept` whose blocks are no longer,
    else the nearest lossless one. kept: as plans_within returns them.
    """
    asked = available_plan(plan, modes)
    if asked.mode is not Mode.DIFFUSION or asked in kept:
        return asked
    shorter = (other for other in kept if other.block_length <= asked.block_length)
    return next(shorter, None) or lossless_plan(plan, modes)
