"""The controller, which decides for every replica from the loads of all; of any number one leads."""

import asyncio
import logging
import os
import secrets
import socket
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from policies.control.loop import PERIOD_S, Clock, Sleep, run_every
from policies.control.plan import DecisionRecord, ObservedPlan, ReplicaPlan, told
from policies.control.store import ClusterView, Lease, LoadStore, PlanWrite, StoreUnavailable
from policies.failures import Failures
from policies.modes import DecodePlan
from policies.policy import Policy, Snapshot
from policies.replica_load import ClusterLoad, Freshness, ObservedLoad

logger = logging.getLogger(__name__)

OnView = Callable[[ClusterView, float], None]
"""A function that is given what was read, and when it was asked for."""

HEARTBEAT_S = 5.0
"""The period at which one of the decisions that change nothing is logged, the replicas taking turns."""
MAX_HELD_S = 1e9
"""The longest time that a plan is taken to have been held, whatever a replica says."""


@dataclass(frozen=True, slots=True)
class _Known:
    """The leader's memory of a replica since its last committed round."""

    state: Any
    """The policy's state for the replica."""
    decode: DecodePlan
    version: int
    """The version of the replica's last plan."""


@dataclass(slots=True)
class _Round:
    """The outcome of one round, not yet committed."""

    known: dict[str, _Known] = field(default_factory=dict)
    """The memory of each replica after the round, by its id."""
    writes: dict[str, PlanWrite] = field(default_factory=dict)
    """The plans to write, by replica id."""
    confirmed: list[str] = field(default_factory=list)
    """The ids of replicas whose stored plans stay as they are."""
    records: list[DecisionRecord] = field(default_factory=list)
    """The decisions that change a plan, all of them logged."""
    unchanged: list[DecisionRecord] = field(default_factory=list)
    """The decisions that change nothing, of which one is logged now and then."""


class Controller:
    """Reads the loads, decides, and writes the plans that changed, every period while it has the lease.

    A new leader starts from what the replicas run and the plans in the store, so that a take-over by
    itself shifts nothing.
    name: shown as the leader in the decision log; made unique here.
    on_view: given all that is read, with the time by `clock` before it was asked for.
    """

    def __init__(
        self,
        store: LoadStore,
        policy: Policy[Any],
        *,
        name: str | None = None,
        period_s: float = PERIOD_S,
        heartbeat_s: float = HEARTBEAT_S,
        on_view: OnView = lambda view, asked_at_s: None,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ):
        self.name = f"{name or socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._store = store
        self._policy = policy
        self._period_s = period_s
        self._heartbeat_s = heartbeat_s
        self._on_view = on_view
        self._clock = clock
        self._sleep = sleep
        self._lease: Lease | None = None
        self._known: dict[str, _Known] = {}
        self._heartbeat_due_s = clock()
        self._heartbeat_replica_id = ""
        self._is_cut_off = False
        self._failures = Failures("deciding for a replica")

    @property
    def is_leader(self) -> bool:
        """True if this controller had the lease at its last contact with the store."""
        return self._lease is not None

    async def run(self, stop: asyncio.Event) -> None:
        """Runs a round every period, store or no store, until `stop` is set; then gives the lease up."""
        failures = Failures("a round of the controller")
        await run_every(self._period_s, self._step_if_possible, stop, self._clock, self._sleep, failures)
        if self._lease is not None:
            try:
                await self._store.release_lease(self._lease)
            except StoreUnavailable as error:
                logger.info("the lease expires by itself: %s", error)
            self._resign()

    def set_policy(self, policy: Policy[Any]) -> None:
        """Sets the policy of the next round and those after it, which go on from what the replicas run."""
        self._policy = policy
        self._known = {}

    async def step(self) -> None:
        """Runs one round; does nothing where another controller leads. Raises StoreUnavailable."""
        if self._lease is None:
            await self._acquire()
        if self._lease is None:
            return
        policy, asked_at_s = self._policy, self._clock()
        view = await self._store.read_view()
        self._on_view(view, asked_at_s)
        if view.leader != self.name:
            self._resign()
            await self._acquire()
        lease = self._lease
        if lease is None:
            return
        outcome = self._decide_all(view)
        heartbeat = self._heartbeat(outcome.unchanged)
        if await self._store.commit(lease, outcome.writes, outcome.confirmed, [*outcome.records, *heartbeat]):
            # A policy that came in meanwhile remembers nothing of the one before.
            self._known = outcome.known if policy is self._policy else {}
        else:
            self._resign()

    async def _step_if_possible(self) -> None:
        try:
            await self.step()
        except StoreUnavailable as error:
            if not self._is_cut_off:
                logger.warning("controller %s is without its store: %s", self.name, error)
            self._is_cut_off = True
        else:
            self._is_cut_off = False

    async def _acquire(self) -> None:
        self._lease = await self._store.acquire_lease(self.name)
        if self._lease is not None:
            logger.info("controller %s leads", self.name)

    def _resign(self) -> None:
        """Drops the lease and the memory: another may decide now, so what is known here goes out of date."""
        logger.info("controller %s no longer leads", self.name)
        self._lease = None
        self._known = {}

    def _decide_all(self, view: ClusterView) -> _Round:
        """Decides for every replica with a fresh load.

        Replicas with a stale load, or one that no decision can be made from, keep their plan; lost ones
        are forgotten and their plans expire.
        """
        outcome = _Round()
        for seen in view.loads.replicas:
            stored = view.plans.get(seen.load.replica_id)
            if seen.freshness is Freshness.FRESH:
                with self._failures:
                    self._decide_one(seen, stored, view.loads, outcome)
                    continue
            if seen.freshness is not Freshness.LOST:
                self._leave_as_it_is(seen.load.replica_id, stored, outcome)
        return outcome

    def _leave_as_it_is(self, replica_id: str, stored: ObservedPlan | None, outcome: _Round) -> None:
        if replica_id in self._known:
            outcome.known[replica_id] = self._known[replica_id]
        if stored is not None:
            outcome.confirmed.append(replica_id)

    def _decide_one(
        self, seen: ObservedLoad, stored: ObservedPlan | None, cluster: ClusterLoad, outcome: _Round
    ) -> None:
        load, now_s = seen.load, self._clock()
        known = self._known.get(load.replica_id)
        running, held_s = _in_force(seen, stored)
        if known is not None and running in (None, known.decode):
            state, running = known.state, known.decode
        else:
            state = self._policy.resume(running, held_s, now_s)
        decision, state = self._policy.decide(Snapshot(load, running, cluster), state, now_s)

        stored_version = stored.plan.version if stored is not None else 0
        version = max(stored_version, load.plan_version, known.version if known is not None else 0)
        plan = ReplicaPlan(version, decision.decode, self._policy.name, told(decision.reason), seen.age_s)
        # A replica that left the stored plan comes back only for a newer one.
        is_as_stored = (
            stored is not None
            and (stored.plan.version, stored.plan.rule) == (version, plan.rule)
            and stored.plan.decode == plan.decode == running
        )
        if is_as_stored:
            outcome.confirmed.append(load.replica_id)
            outcome.unchanged.append(DecisionRecord(plan, load, False, self.name))
        else:
            plan = replace(plan, version=version + 1)
            held_s = held_s if plan.decode == running else 0.0
            outcome.writes[load.replica_id] = PlanWrite(plan, held_s)
            outcome.records.append(DecisionRecord(plan, load, True, self.name))
        outcome.known[load.replica_id] = _Known(state, plan.decode, plan.version)

    def _heartbeat(self, unchanged: list[DecisionRecord]) -> list[DecisionRecord]:
        now_s = self._clock()
        if not unchanged or now_s < self._heartbeat_due_s:
            return []
        self._heartbeat_due_s = now_s + self._heartbeat_s
        ids = [record.load.replica_id for record in unchanged]
        record = unchanged[bisect_right(ids, self._heartbeat_replica_id) % len(ids)]
        self._heartbeat_replica_id = record.load.replica_id
        return [record]


def _in_force(seen: ObservedLoad, stored: ObservedPlan | None) -> tuple[DecodePlan | None, float]:
    """Returns the plan that a replica runs, None if it can't be told, and for how many seconds it has.

    The replica's own word counts once it has seen the last plan written, since it may have decided alone
    after that. A load older than the plan says nothing of it.
    """
    load = seen.load
    if load.decode is not None and (stored is None or load.plan_version >= stored.plan.version):
        return load.decode, min(load.decode_held_s, MAX_HELD_S) + seen.age_s - load.silent_s
    if stored is not None:
        return stored.plan.decode, stored.held_s
    return None, 0.0
