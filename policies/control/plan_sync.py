"""The replica's side of the control path: publish the load, follow the plan, else decide alone."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from policies.control.loop import PERIOD_S, Clock, Sleep, run_every
from policies.control.plan import ObservedPlan, ReplicaPlan, told
from policies.control.store import LoadStore, PolicyEntry, StoreUnavailable
from policies.failures import Failures
from policies.modes import DecodePlan
from policies.policy import Policy, Snapshot, Trial
from policies.replica_load import ReplicaLoad

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 25
"""Steps that have failed in a row when the loop counts as broken: in these 5 s a load that is not published
anew is lost. No step fails for want of the store."""


class PlanFollower:
    """Keeps `plan` up to date, which the replica's `auto` requests run.

    While the store is unavailable, or its plan stale, missing or outdated, the replica decides by
    the same policy from its own load, going on from the plan in force; `rule` then says so.
    read_load: returns the load now; `plan_version`, `decode` and `decode_held_s` are filled in here.
    on_plan: called with each plan that differs from the one before in what to run or by which rule, and with
      the one in force when the policy changes, which ends a trial.
    on_trial: called with what the policy has the replica try next, when it changes.
    on_policy_entry: awaited with the policy setting that came with each plan (PolicyWatch.apply).
    """

    def __init__(
        self,
        store: LoadStore,
        policy: Policy[Any],
        read_load: Callable[[], ReplicaLoad],
        on_plan: Callable[[ReplicaPlan], None] | None = None,
        on_trial: Callable[[Trial | None], None] | None = None,
        on_policy_entry: Callable[[PolicyEntry], Awaitable[None]] | None = None,
        *,
        period_s: float = PERIOD_S,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ):
        self._store = store
        self._policy = policy
        self._read_load = read_load
        self._on_plan = on_plan
        self._on_trial = on_trial
        self._on_policy_entry = on_policy_entry
        self._trial: Trial | None = None
        self._period_s = period_s
        self._clock = clock
        self._sleep = sleep
        self._failures = Failures("publishing the load and following the plan")
        self._held_since_s = clock()
        self._state = policy.resume(None, 0.0, self._held_since_s)
        load = read_load()
        self._replica_id = load.replica_id
        self._plan = self._decided(load, None, 0, "starting")

    @property
    def plan(self) -> ReplicaPlan:
        """The plan in force. May be read from any thread."""
        return self._plan

    def plan_at(self, load: ReplicaLoad) -> DecodePlan:
        """Returns the plan that the policy would choose at this load, whatever the replica runs now."""
        return self._policy.decide(Snapshot(load), self._policy.resume(None, 0.0, 0.0), 0.0)[0].decode

    def set_policy(self, policy: Policy[Any]) -> None:
        """Sets the policy by which the replica decides alone, going on from the plan in force.

        What the one before had tried or wanted to try ends: this one may not allow it.
        """
        now_s = self._clock()
        self._policy = policy
        self._state = policy.resume(self._plan.decode, now_s - self._held_since_s, now_s)
        if self._on_trial is not None and self._trial is not None:
            self._trial = None
            self._on_trial(None)
        if self._on_plan is not None:
            self._on_plan(self._plan)

    async def run(self, stop: asyncio.Event) -> None:
        """Steps every period until `stop` is set, then takes the replica out of the store.

        A step that fails, by a load that can't be read or a policy that raises, leaves the plan as it is.
        """
        await run_every(self._period_s, self.step, stop, self._clock, self._sleep, self._failures)
        try:
            await self._store.withdraw(self._replica_id)
        except StoreUnavailable as error:
            logger.info("the replica's load expires by itself: %s", error)

    def check(self) -> None:
        """Raises RuntimeError where MAX_FAILED_STEPS steps in a row have failed.

        The loop runs, but nobody sees the replica's load.
        """
        num_failed = self._failures.num_in_row
        if num_failed >= MAX_FAILED_STEPS:
            raise RuntimeError(f"publishing the load has failed {num_failed} times in a row; see the log")

    async def step(self) -> ReplicaPlan:
        """Publishes the load and puts in force the plan that follows; never raises StoreUnavailable."""
        load = replace(
            self._read_load(),
            plan_version=self._plan.version,
            decode=self._plan.decode,
            decode_held_s=max(0.0, self._clock() - self._held_since_s),
        )
        try:
            seen = await self._store.publish_and_read(load)
        except StoreUnavailable:
            plan = self._alone(load, "store unavailable")
        else:
            if self._on_policy_entry is not None:
                await self._on_policy_entry(self._store.policy_entry)
            plan = self._follow(load, seen)
        self._put_in_force(plan)
        self._try(load, plan)
        return plan

    def _follow(self, load: ReplicaLoad, seen: ObservedPlan | None) -> ReplicaPlan:
        if seen is None:
            return self._alone(load, "no plan")
        if seen.is_stale:
            return self._alone(load, "plan stale")
        differs = seen.plan.decode != self._plan.decode
        if seen.plan.version < self._plan.version or (differs and seen.plan.version == self._plan.version):
            # A store that fell back to older data, or a plan left for a decision of our own while
            # the store was away: the controller sees both in our load, and writes a newer plan.
            return self._alone(load, "plan outdated")
        if differs:
            self._state = self._policy.resume(seen.plan.decode, seen.held_s, self._clock())
        return seen.plan

    def _alone(self, load: ReplicaLoad, why: str) -> ReplicaPlan:
        return self._decided(load, self._plan.decode, self._plan.version, why)

    def _decided(
        self, load: ReplicaLoad, current: DecodePlan | None, version: int, why_alone: str
    ) -> ReplicaPlan:
        decision, self._state = self._policy.decide(Snapshot(load, current), self._state, self._clock())
        rule = f"{self._policy.name} (local: {why_alone})"
        return ReplicaPlan(version, decision.decode, rule, told(decision.reason))

    def _try(self, load: ReplicaLoad, plan: ReplicaPlan) -> None:
        before, self._trial = self._trial, self._policy.trial(load, plan.decode)
        if self._on_trial is not None and self._trial != before:
            self._on_trial(self._trial)

    def _put_in_force(self, plan: ReplicaPlan) -> None:
        before, self._plan = self._plan, plan
        if plan.decode != before.decode:
            self._held_since_s = self._clock()
        if plan.rule != before.rule:
            logger.info("mode now decided by %s", plan.rule)
        if self._on_plan is not None and (plan.decode, plan.rule) != (before.decode, before.rule):
            self._on_plan(plan)
