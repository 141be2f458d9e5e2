"""The simulated cluster: routers, replicas and the control loop, event by event.

The policy, `stabilise`, placement and admission are the project's own objects, called as the router, the
controller and a replica on its own call them. Every 200 ms each replica applies the plan that was decided
from the load it published a period before, and publishes its load; routers read the loads half a
period later. So decisions and placement work from loads up to 0.4 s old, as in the real cluster.
"""

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.simulator.load import Requests
from loadtest.simulator.parts import Hardware
from loadtest.simulator.replica import SimulatedReplica
from loadtest.simulator.yields import Acceptance, Rounds
from policies.control.loop import PERIOD_S
from policies.control.plan import PLAN_STALE_S
from policies.cost import RoundYield
from policies.modes import DecodePlan
from policies.policy import Policy, Snapshot
from policies.replica_load import ClusterLoad, ObservedLoad, ReplicaLoad
from router.admission_control import AdmissionControl, Admit
from router.config import AdmissionConfig
from router.placement import PlacementRequest, Sent, place
from router.prefix_map import CHUNK_CHARS, PrefixMap

REPLICAS_A_ROUTER = 64
TICKS_AN_EXPLORATION = 5
"""Periods between a replica's questions to its policy what else to try; the real one asks every period."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The loss of a replica, which comes back empty."""

    replica: int
    at_s: float
    """The time at which it goes."""
    for_s: float
    """The time until it is back."""


@dataclass(frozen=True, slots=True)
class Outage:
    """A time without Redis."""

    at_s: float
    """The time at which it begins."""
    for_s: float
    """Its length."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The machines of a simulated cluster, and what befalls them."""

    num_replicas: int
    hardware: Hardware
    admission: AdmissionConfig
    start: DecodePlan
    believed_yields: Mapping[DecodePlan, RoundYield]
    """The replicas' belief of what a round of each plan brings before they have seen any."""
    failures: tuple[Failure, ...] = ()
    outages: tuple[Outage, ...] = ()


@dataclass(slots=True)
class Record:
    """The outcome of a run; lists by request number, times in seconds, NaN where it did not come to that."""

    first_s: list[float]
    finish_s: list[float]
    shed: int = 0
    unavailable: int = 0
    lost: int = 0
    """Requests ended by the loss of their replica after their first token, or twice before it."""
    retried: int = 0
    shifts: int = 0
    end_s: float = 0.0
    num_decisions: int = 0
    tokens_by_mode: dict[str, float] = field(default_factory=dict)


Decide = Callable[[SimulatedReplica, ReplicaLoad, float], DecodePlan]
"""Chooses the plan that a replica should run; for oracles, which see the replica as it is."""


class _Router:
    """One ingress: its view of the loads, its own traffic, its memory of prompts."""

    def __init__(self, admission: AdmissionConfig, seed: int):
        self.admission = AdmissionControl(admission)
        self.traffic = self.admission.traffic
        self.prefixes = PrefixMap()
        self.rng = random.Random(seed)


class Cluster:
    """A simulated cluster and one run of it.

    policy: None lets `decide` choose, at every period and without dwell
    """

    def __init__(
        self,
        setting: Setting,
        requests: Requests,
        rounds: Mapping[DecodePlan, Rounds],
        policy: Policy[Any] | None,
        seed: int = 0,
        decide: Decide | None = None,
    ):
        assert (policy is None) != (decide is None)
        self._setting = setting
        self._requests = requests
        self._policy = policy
        self._decide = decide
        self._ids = [f"r{number}" for number in range(setting.num_replicas)]
        self._numbers = {replica_id: number for number, replica_id in enumerate(self._ids)}
        self._replicas = [
            SimulatedReplica(
                replica_id, setting.hardware, requests, rounds, setting.start, setting.believed_yields
            )
            for replica_id in self._ids
        ]
        num_routers = max(1, setting.num_replicas // REPLICAS_A_ROUTER)
        self._routers = [_Router(setting.admission, seed * 1000 + number) for number in range(num_routers)]
        self._states = [
            policy.resume(setting.start, 0.0, 0.0) if policy is not None else None for _ in self._replicas
        ]
        self._plans: list[DecodePlan | None] = [None] * setting.num_replicas
        self._up = set(range(setting.num_replicas))
        self._open = list(self._ids)
        self._published: dict[str, ReplicaLoad] = {}
        self._published_s = -math.inf
        self._num_ticks = 0
        self._view: dict[str, ReplicaLoad] = {}
        self._view_s = -math.inf
        self._placed: dict[int, tuple[int, Sent]] = {}  # request -> router, and its own count of it
        self._retried: set[int] = set()
        self._events: list[tuple[float, int, int]] = []
        nan = math.nan
        self.record = Record([nan] * len(requests), [nan] * len(requests))

    def run(self) -> Record:
        """Runs until every request has ended."""
        requests, events, replicas = self._requests, self._events, self._replicas
        arrivals = requests.arrival_s
        num = len(arrivals)
        next_request = 0
        faults = self._faults()
        next_tick_s = 0.0
        is_view_due = False
        while next_request < num or self._placed:
            arrival_s = arrivals[next_request] if next_request < num else math.inf
            event_s = events[0][0] if events else math.inf
            fault_s = faults[-1][0] if faults else math.inf
            if arrival_s <= event_s and arrival_s < next_tick_s and arrival_s < fault_s:
                self._arrive(next_request, arrival_s)
                next_request += 1
            elif event_s < next_tick_s and event_s < fault_s:
                _, number, version = heapq.heappop(events)
                replica = replicas[number]
                if replica.version == version:
                    self._advance(number, replica, event_s)
            elif fault_s <= next_tick_s:
                faults.pop()[1](fault_s)
            elif is_view_due:
                self._read_view(next_tick_s)
                is_view_due = False
                next_tick_s += PERIOD_S / 2
            else:
                self._tick(next_tick_s)
                is_view_due = True
                next_tick_s += PERIOD_S / 2
        record = self.record
        record.shifts = sum(replica.num_shifts for replica in replicas)
        for replica in replicas:
            for mode, tokens in replica.tokens_by_mode.items():
                record.tokens_by_mode[mode.value] = record.tokens_by_mode.get(mode.value, 0.0) + tokens
        return record

    def _advance(self, number: int, replica: SimulatedReplica, now_s: float) -> None:
        ended = replica.advance()
        record = self.record
        if replica.first_s:
            for request, first_s in replica.first_s:
                record.first_s[request] = first_s
            replica.first_s.clear()
        for request in ended:
            record.finish_s[request] = now_s
            router_number, sent = self._placed.pop(request)
            router = self._routers[router_number]
            router.traffic.ended(sent, now_s)
        if ended:
            record.end_s = now_s
        self._schedule(number, replica)

    def _schedule(self, number: int, replica: SimulatedReplica) -> None:
        if replica.next_s < math.inf:
            heapq.heappush(self._events, (replica.next_s, number, replica.version))

    def _arrive(self, request: int, now_s: float) -> None:
        router_number = request % len(self._routers)
        router = self._routers[router_number]
        tokens = self._requests.prompt[request]
        opened = self._open

        def seen(replica_id: str) -> ObservedLoad | None:
            return self._seen(replica_id, now_s)

        verdict = router.admission.check(opened, seen, now_s, num_prompt_tokens=tokens)
        if not isinstance(verdict, Admit):
            if verdict.contended:
                self.record.shed += 1
            else:
                self.record.unavailable += 1
            return
        self._place(request, router_number, now_s)

    def _place(self, request: int, router_number: int, now_s: float) -> None:
        router = self._routers[router_number]
        requests = self._requests
        tokens = requests.prompt[request]
        pinned = requests.pinned[request]
        keys = self._keys(request)
        held = router.prefixes.held(keys, now_s) if keys else {}
        wanted = PlacementRequest(None if pinned is None else pinned.mode, held, tokens)
        chosen = place(
            self._open,
            router.traffic,
            lambda replica_id: self._seen(replica_id, now_s),
            now_s,
            router.rng,
            wanted,
        )
        if chosen is None:
            self.record.unavailable += 1
            return
        sent = router.traffic.started(chosen, now_s, tokens)
        if keys:
            router.prefixes.sent(keys, chosen, now_s)
        number = self._numbers[chosen]
        self._placed[request] = (router_number, sent)
        replica = self._replicas[number]
        before = replica.version
        replica.submit(request, now_s)
        if replica.version != before:
            self._schedule(number, replica)

    def _keys(self, request: int) -> tuple[int, ...]:
        """The prefix keys of the text that a request shares with others; the rest nobody else asks for."""
        prefix = self._requests.prefix[request]
        if prefix < 0:
            return ()
        num_chunks = max(1, self._requests.prefix_tokens * 4 // CHUNK_CHARS)
        return tuple(prefix * 1000 + chunk for chunk in range(num_chunks))

    def _seen(self, replica_id: str, now_s: float) -> ObservedLoad | None:
        load = self._view.get(replica_id)
        return None if load is None else ObservedLoad(load, now_s - self._view_s)

    # The control path.

    def _tick(self, now_s: float) -> None:
        """Replicas apply what was decided and publish; without the store each decides for itself."""
        if self._decide is not None:
            for number in self._up:
                replica = self._replicas[number]
                self._apply(number, self._decide(replica, replica.load(now_s), now_s), now_s)
        if not self._is_cut_off(now_s):
            for number in self._up:
                plan = self._plans[number]
                if plan is not None and self._policy is not None:
                    self._apply(number, plan, now_s)
            self._published = {
                self._ids[number]: self._replicas[number].load(now_s) for number in sorted(self._up)
            }
            self._published_s = now_s
            self._num_ticks += 1
            if self._policy is not None and self._num_ticks % TICKS_AN_EXPLORATION == 0:
                self._explore(self._policy)
        elif self._policy is not None:
            for number in self._up:
                load = self._replicas[number].load(now_s)
                self._apply(number, self._chosen(self._policy, number, load, None, now_s), now_s)

    def _explore(self, policy: Policy[Any]) -> None:
        for replica_id, load in self._published.items():
            replica = self._replicas[self._numbers[replica_id]]
            trial = policy.trial(load, replica.plan)
            if trial is not None:
                replica.explore(trial.plan)

    def _read_view(self, now_s: float) -> None:
        """Half a period on: routers read the loads, and the controller decides from them."""
        if self._is_cut_off(now_s) or now_s - self._published_s > PLAN_STALE_S:
            return
        self._view, self._view_s = self._published, self._published_s
        age_s = now_s - self._published_s
        if self._policy is None:
            return
        cluster = ClusterLoad(tuple(ObservedLoad(load, age_s) for load in self._published.values()))
        for number in self._up:
            load = self._published.get(self._ids[number])
            if load is not None:
                self._plans[number] = self._chosen(self._policy, number, load, cluster, now_s)

    def _chosen(
        self, policy: Policy[Any], number: int, load: ReplicaLoad, cluster: ClusterLoad | None, now_s: float
    ) -> DecodePlan:
        self.record.num_decisions += 1
        snapshot = Snapshot(load, self._replicas[number].plan, cluster)
        decision, self._states[number] = policy.decide(snapshot, self._states[number], now_s)
        return decision.decode

    def _apply(self, number: int, plan: DecodePlan, now_s: float) -> None:
        replica = self._replicas[number]
        before = replica.version
        replica.set_plan(plan, now_s)
        if replica.version != before:
            self._schedule(number, replica)

    def _is_cut_off(self, now_s: float) -> bool:
        return any(0 <= now_s - outage.at_s < outage.for_s for outage in self._setting.outages)

    # Failures.

    def _faults(self) -> list[tuple[float, Callable[[float], None]]]:
        """The faults and their times, latest first."""
        faults: list[tuple[float, Callable[[float], None]]] = []
        for failure in self._setting.failures:
            number = failure.replica
            faults.append((failure.at_s, lambda now_s, number=number: self._fail(number, now_s)))  # type: ignore[misc]
            back_s = failure.at_s + failure.for_s
            faults.append((back_s, lambda now_s, number=number: self._come_back(number, now_s)))  # type: ignore[misc]
        return sorted(faults, key=lambda fault: -fault[0])

    def _fail(self, number: int, now_s: float) -> None:
        """Loses a replica, which routers see at once; requests that had sent nothing go elsewhere, once."""
        if number not in self._up:
            return
        replica = self._replicas[number]
        self._up.discard(number)
        self._open = [replica_id for replica_id in self._open if replica_id != replica.replica_id]
        for router in self._routers:
            router.prefixes.forget(replica.replica_id)
        for request in replica.kill():
            router_number, sent = self._placed.pop(request)
            self._routers[router_number].traffic.ended(sent, now_s)
            if math.isnan(self.record.first_s[request]) and request not in self._retried:
                self._retried.add(request)
                self.record.retried += 1
                self._place(request, router_number, now_s)
            else:
                self.record.lost += 1
        for router in self._routers:
            router.traffic.forget(replica.replica_id)

    def _come_back(self, number: int, now_s: float) -> None:
        if number in self._up:
            return
        replica = self._replicas[number]
        self._up.add(number)
        self._open = [*self._open, replica.replica_id]
        self._plans[number] = None
        replica.plan_since_s = now_s
        if self._policy is not None:
            self._states[number] = self._policy.resume(None, 0.0, now_s)


def needed_rounds(plans: Sequence[DecodePlan], acceptance: Acceptance) -> dict[DecodePlan, Rounds]:
    return {plan: Rounds(plan, acceptance.diffusion) for plan in plans}
