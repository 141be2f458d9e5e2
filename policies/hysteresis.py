"""Hysteresis, which keeps any policy from thrashing: dwell, margin and a bound on shifts a minute."""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from policies.failures import Failures
from policies.modes import DecodePlan, Mode, available_plan, default_plan
from policies.policy import Decision, Policy, PolicyParameters, Snapshot, Trial
from policies.replica_load import ReplicaLoad

logger = logging.getLogger(__name__)

WINDOW_S = 60.0
"""The time over which shifts are counted against max_shifts_per_minute."""
SETTLED = 0.5
"""The share that is left of the margin once a plan has been held for long."""


class StabiliseParameters(PolicyParameters):
    """The parameters of WithHysteresis."""

    dwell_s: float = Field(default=0.8, ge=0.0)
    """The least time between two shifts, in seconds. The default is a control period short of a second, so
    that a change of load is answered within one whatever went before."""
    max_shifts_per_minute: int = Field(default=20, ge=1)
    """The most shifts that requests see, over any 60 s."""
    margin: float = Field(default=0.1, ge=0.0)
    """The least gain worth a shift, for policies that know the gain (0.1 is 10 %)."""
    margin_half_life_s: float = Field(default=5.0, gt=0.0)
    """The seconds without a shift in which the margin halves, down to SETTLED of it, so that noise shifts
    nothing and a small gain that lasts is taken in the end."""


@dataclass(frozen=True, slots=True)
class StableState:
    """The state of WithHysteresis for a replica; its times are by the clock the policy is called with."""

    inner: Any
    """The state of the policy within."""
    current: DecodePlan | None
    since_s: float
    """The time at which the current plan began."""
    shifts_s: tuple[float, ...] = ()
    """The times of the last minute's shifts."""
    has_failed: bool = False
    """True if the policy's last call raised."""


class WithHysteresis(Policy[StableState]):
    """Wraps a policy, which decides; a shift that it wants too soon, too often or for too little waits.

    A policy that raises, or gives what is no decision, leaves the replica on the plan it runs: a policy's bug
    never stops a server.
    """

    def __init__(self, inner: Policy[Any], parameters: StabiliseParameters):
        super().__init__(parameters)
        self.name = inner.name
        self._inner = inner
        self._bounds = parameters
        self._trial_failures = Failures(f"policy {inner.name}, asked what to try,")
        self._resume_failures = Failures(f"policy {inner.name}, asked to go on from a plan,")

    def resume(self, current: DecodePlan | None, held_s: float, now_s: float) -> StableState:
        inner = None
        with self._resume_failures:
            inner = self._inner.resume(current, held_s, now_s)
        return StableState(inner, current, now_s - held_s)

    def decide(self, snapshot: Snapshot, state: StableState, now_s: float) -> tuple[Decision, StableState]:
        current = state.current
        try:
            wanted, inner = self._inner.decide(replace(snapshot, current=current), state.inner, now_s)
            _check_decision(wanted)
        except Exception as error:
            if not state.has_failed:
                logger.exception("policy %s failed; the replica keeps its mode", self.name)
            plan = available_plan(current or default_plan(Mode.AR), snapshot.load.modes)
            return Decision(plan, f"policy failed: {error!r}"), replace(state, has_failed=True)

        state = replace(state, inner=inner, has_failed=False)
        if current is None:
            return wanted, replace(state, current=wanted.decode, since_s=now_s)
        if wanted.decode == current:
            return wanted, state
        recent = tuple(at_s for at_s in state.shifts_s if now_s - at_s < WINDOW_S)
        obstacle = self._obstacle(wanted, now_s - state.since_s, len(recent))
        if obstacle is not None and current.mode in snapshot.load.modes:
            held = Decision(current, f"{wanted.reason}; {wanted.decode.mode} held back: {obstacle}", 0.0)
            return held, replace(state, shifts_s=recent)
        if not snapshot.load.num_auto:  # nobody sees it
            return wanted, replace(state, current=wanted.decode, shifts_s=recent)
        return wanted, replace(state, current=wanted.decode, since_s=now_s, shifts_s=(*recent, now_s))

    def trial(self, load: ReplicaLoad, running: DecodePlan) -> Trial | None:
        with self._trial_failures:
            wanted = self._inner.trial(load, running)
            if wanted is not None:
                _check_trial(wanted)
            return wanted
        return None

    def _obstacle(self, wanted: Decision, held_s: float, num_recent: int) -> str | None:
        patience = 0.5 ** (max(0.0, held_s) / self._bounds.margin_half_life_s)
        margin = self._bounds.margin * max(SETTLED, patience)
        if wanted.gain is not None and not wanted.gain >= margin:  # nor is one that is no number
            return f"gain {wanted.gain:.1%} below the margin of {margin:.1%}"
        if held_s < self._bounds.dwell_s - 1e-6:  # periods that add up to it may lack a rounding
            return f"{held_s:.1f} s of {self._bounds.dwell_s:g} s dwell"
        if num_recent >= self._bounds.max_shifts_per_minute:
            return f"{num_recent} shifts in the last minute"
        return None


def _check_decision(decision: Decision) -> None:
    """Raises TypeError for what a policy of somebody's own must not decide."""
    if not isinstance(decision.decode, DecodePlan):
        raise TypeError(f"a decision's plan is a DecodePlan, not {decision.decode!r}")
    if not isinstance(decision.reason, str):
        raise TypeError(f"a decision's reason is a string, not {decision.reason!r}")
    if not (decision.gain is None or isinstance(decision.gain, int | float)):
        raise TypeError(f"a decision's gain is a number or None, not {decision.gain!r}")


def _check_trial(trial: Trial) -> None:
    """Raises TypeError or ValueError for what a policy of somebody's own must not have tried."""
    if not (isinstance(trial, Trial) and isinstance(trial.plan, DecodePlan)):
        raise TypeError(f"a trial is a Trial of a DecodePlan, not {trial!r}")
    if not all(math.isfinite(number) for number in (trial.loss, trial.share, trial.change_s)):
        raise ValueError(f"a trial's loss, share and change_s are finite numbers: {trial!r}")
