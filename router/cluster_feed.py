"""The cluster as a stream of server-sent events: one reading of the store a second for all who watch.

While nobody watches nothing is read or computed. Each watcher gets the decisions that shifted a plan lately,
then a snapshot a second and each new shift; one that reads slowly misses snapshots, but no shift.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from policies.control.loop import Clock, Sleep, run_every
from policies.control.plan import DecisionRecord, ObservedPlan
from policies.control.store import ClusterView, LoadStore, StoreUnavailable
from policies.failures import Failures
from policies.forecast import forecast
from policies.modes import DecodePlan, Mode
from policies.replica_load import ClusterLoad, ObservedLoad
from replicas.errors import ErrorCode, TriadError
from router.dispatch import Dispatcher
from router.errors import encode
from router.latencies import RecentLatencies, summary
from router.load_view import LoadView
from router.state import plain

PERIOD_S = 1.0
MAX_WATCHERS = 32
MAX_STREAM_S = 60.0
"""The longest stream, after which a watcher asks again: an open one holds up the ingress that is to end."""
NUM_READ = 200
"""Decisions read at once; most change nothing."""
NUM_KEPT = 100
"""Shifts that a new watcher is told of."""

Rates = Mapping[Mode, float]


class ClusterFeed:
    """The readings for all watchers of one ingress.

    latencies: of the requests that this ingress has answered
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        view: LoadView,
        store: LoadStore,
        latencies: RecentLatencies,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ):
        self._dispatcher = dispatcher
        self._view = view
        self._store = store
        self._latencies = latencies
        self._clock = clock
        self._sleep = sleep
        self._rates = TokenRates()
        self._shifts: deque[tuple[int, bytes]] = deque(maxlen=NUM_KEPT)  # numbered, each as its event
        self._num_shifts = 0
        self._known: deque[tuple[float, str, int]] = deque(maxlen=4 * NUM_KEPT)
        self._snapshot = b""
        self._news = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self.num_watchers = 0
        self.num_readings = 0

    def check_room(self) -> None:
        """Raises TriadError where no watcher is taken: too many are here, or the server is going."""
        if self._dispatcher.is_draining:
            raise TriadError(ErrorCode.UNAVAILABLE, "The server is shutting down.")
        if self.num_watchers >= MAX_WATCHERS:
            message = f"{MAX_WATCHERS} are watching already; close another console."
            raise TriadError(ErrorCode.QUEUE_FULL, message)

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Yields server-sent events, `shift` and `snapshot`, for MAX_STREAM_S, or until the server goes."""
        self.num_watchers += 1
        if self._reading is None:
            self._snapshot = b""
            self._reading = asyncio.create_task(self._run(), name="the cluster feed")
        until_s = self._clock() + MAX_STREAM_S
        num_told = 0
        try:
            while self._clock() < until_s and not self._dispatcher.is_draining:
                news = self._news
                if self._snapshot:
                    shifts = [event for number, event in self._shifts if number > num_told]
                    num_told = self._num_shifts
                    yield b"".join((*shifts, self._snapshot))
                await news.wait()
        finally:
            self.num_watchers -= 1
            if not self.num_watchers and self._reading is not None:
                self._reading.cancel()
                self._reading = None

    async def _run(self) -> None:
        failures = Failures("reading the cluster for those who watch")
        await run_every(PERIOD_S, self._read, asyncio.Event(), self._clock, self._sleep, failures)

    async def _read(self) -> None:
        self.num_readings += 1
        error: str | None = None
        try:
            seen = await self._store.read_view()
            self._note(await self._store.recent_decisions(NUM_READ))
        except StoreUnavailable as lost:
            seen, error = ClusterView(ClusterLoad(self._view.loads())), str(lost)
        self._snapshot = _event("snapshot", self._picture(seen, error))
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _note(self, decisions: tuple[DecisionRecord, ...]) -> None:
        """Keeps the shifts among the decisions, newest first, that are not known yet."""
        for record in reversed(decisions):
            key = (record.at_s, record.load.replica_id, record.plan.version)
            if record.changed and key not in self._known:
                self._known.append(key)
                self._num_shifts += 1
                self._shifts.append((self._num_shifts, _event("shift", shift(record))))

    def _picture(self, seen: ClusterView, error: str | None) -> dict[str, Any]:
        recent = self._latencies.recent()
        replicas = []
        for observed in seen.loads.replicas:
            replica_id = observed.load.replica_id
            rates = self._rates.of(observed, self._clock() - observed.age_s)
            latency = summary(each for each in recent if each.replica_id == replica_id)
            replicas.append(replica(observed, seen.plans.get(replica_id), rates) | {"latency": latency})
        self._rates.keep({each.load.replica_id for each in seen.loads.replicas})
        return {
            "at_s": time.time(),
            "store": {"available": error is None, "error": error},
            "leader": seen.leader,
            "ready": self._dispatcher.ready,
            "replicas": replicas,
            "latency": summary(recent),
        }


class TokenRates:
    """Tokens a second by mode of each replica, from what it says it has made in all."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, Mapping[Mode, int], Rates]] = {}

    def of(self, seen: ObservedLoad, measured_s: float) -> Rates:
        """The rates since the load before; those again, where no new load has come.

        measured_s: the time when the load was measured, on one clock
        """
        totals = seen.load.tokens_total_by_mode
        before = self._last.get(seen.load.replica_id)
        if before is None:
            rates: Rates = {}
        elif measured_s - before[0] < PERIOD_S / 4:
            return before[2]
        else:
            elapsed_s = measured_s - before[0]
            rates = {mode: max(0, num - before[1].get(mode, 0)) / elapsed_s for mode, num in totals.items()}
        self._last[seen.load.replica_id] = measured_s, totals, rates
        return rates

    def keep(self, replica_ids: set[str]) -> None:
        """Forgets all other replicas."""
        self._last = {name: kept for name, kept in self._last.items() if name in replica_ids}


def replica(seen: ObservedLoad, plan: ObservedPlan | None, rates: Rates) -> dict[str, Any]:
    """One replica for people, as JSON has it: its load, and the plan that it runs with its reason."""
    load = seen.load
    in_force = None if load.decode is None else plain(load.decode) | {"held_s": plain(load.decode_held_s)}
    rule, reason = (None, None) if plan is None else (plan.plan.rule, plan.plan.reason)
    return {
        "replica": load.replica_id,
        "freshness": seen.freshness.value,
        "age_s": plain(seen.age_s),
        "running": load.num_running,
        "waiting": load.num_waiting,
        "running_by_mode": plain(load.running_by_mode),
        "pinned_by_mode": plain(load.pinned_by_mode),
        "max_running": load.max_running,
        "pages_used": load.pages_used,
        "num_pages": load.num_pages,
        "tokens_per_s_by_mode": {mode.value: round(rate, 1) for mode, rate in rates.items()},
        "tokens_per_forward": plain(load.tokens_per_forward),
        "plan": None if in_force is None else in_force | {"rule": rule, "reason": reason},
    }


def shift(record: DecisionRecord) -> dict[str, Any]:
    """One shift for people: the plan, the load that it was decided from, and what was forecast of both
    plans; `before` is None where the replica had none."""
    load, plan = record.load, record.plan

    def told(decode: DecodePlan) -> dict[str, Any]:
        expected = forecast(load, decode).tokens_per_s
        return {**plain(decode), "expected_tokens_per_s": round(expected, 1)}

    return {
        "at_s": record.at_s,
        "replica": load.replica_id,
        "version": plan.version,
        "rule": plan.rule,
        "reason": plan.reason,
        "input_age_s": plain(plan.input_age_s),
        "leader": record.leader,
        "plan": told(plan.decode),
        "before": None if load.decode is None else told(load.decode),
        "load": {
            "running": load.num_running,
            "waiting": load.num_waiting,
            "auto": load.num_auto,
            "running_by_mode": plain(load.running_by_mode),
            "tokens_per_s": plain(load.tokens_per_s),
            "pages_used": load.pages_used,
            "num_pages": load.num_pages,
        },
    }


def _event(name: str, body: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode(body))
