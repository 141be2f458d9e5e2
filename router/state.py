"""The cluster's state for people: loads with their age, plans, last decisions, and this router's own view."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from policies.control.plan import ObservedPlan
from policies.control.store import LoadStore, StoreUnavailable
from policies.cost_model import CostModelParameters
from policies.forecast import forecast
from policies.replica_load import ObservedLoad, ReplicaLoad
from router.dispatch import Dispatcher
from router.load_view import LoadView

NUM_DECISIONS = 20


async def cluster_state(dispatcher: Dispatcher, view: LoadView, store: LoadStore) -> dict[str, Any]:
    """The state as JSON, from the store where it answers, else with what this router last read from it."""
    router = {
        "in_flight": dispatcher.in_flight(),
        "ready": dispatcher.ready,
        "num_tasks": len(asyncio.all_tasks()),
    }
    try:
        seen = await store.read_view()
        decisions = await store.recent_decisions(NUM_DECISIONS)
    except StoreUnavailable as error:
        return {
            "store": {"available": False, "error": str(error)},
            "leader": None,
            "replicas": [_replica(load, None) for load in view.loads()],
            "decisions": None,
            "router": router,
        }
    return {
        "store": {"available": True, "error": None},
        "leader": seen.leader,
        "replicas": [_replica(load, seen.plans.get(load.load.replica_id)) for load in seen.loads.replicas],
        "decisions": plain(decisions),
        "router": router,
    }


def _replica(seen: ObservedLoad, plan: ObservedPlan | None) -> dict[str, Any]:
    return {
        "replica": seen.load.replica_id,
        "load": plain(seen.load),
        "age_s": plain(seen.age_s),
        "freshness": seen.freshness.value,
        "plan": None if plan is None else plain(plan) | {"stale": plan.is_stale},
        "forecasts": _forecasts(seen.load),
    }


def _forecasts(load: ReplicaLoad) -> list[dict[str, Any]]:
    """What each plan that `cost_model` may consider should bring under this load; nothing where no request
    has room."""
    if not (load.max_running and load.num_pages and load.page_size and load.max_step_tokens):
        return []
    plans = CostModelParameters(quality="any").candidates(load.modes, risk=load.risk)
    expected = (forecast(load, plan) for plan in plans)
    return [
        {
            "decode": plain(entry.plan),
            "tokens_per_s": plain(entry.tokens_per_s),
            "step_ms": plain(entry.step_ms),
        }
        for entry in expected
    ]


def plain(value: Any) -> Any:
    """Records as JSON has them; a number that JSON doesn't have (no age known: infinite) is null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
