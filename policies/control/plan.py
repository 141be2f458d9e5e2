"""What a policy decided for one replica, and why."""

from dataclasses import dataclass

from policies.modes import DecodePlan
from policies.replica_load import ReplicaLoad

PLAN_STALE_S = 1.5
"""A plan not confirmed for this long has no leader behind it.

Longer than the take-over of a dead leader's lease takes, so that a take-over goes unnoticed.
"""


MAX_REASON_CHARS = 400


def told(reason: str) -> str:
    """A policy's reason as it is stored, a thousand times over: not too long, and any text at all."""
    return reason[:MAX_REASON_CHARS].encode(errors="replace").decode()


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """The plan one replica follows for its `auto` requests.

    version: grows by one with each plan written for this replica; a replica never goes back.
    rule: the policy's name; reason: one line for people, with the inputs that decided it.
    input_age_s: how old the load was that the decision was made from.
    """

    version: int
    decode: DecodePlan
    rule: str
    reason: str
    input_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ObservedPlan:
    """A plan as read from the store; both times in seconds by the store's clock.

    age_s: since the leader last wrote or confirmed it. held_s: since it last changed what to run.
    """

    plan: ReplicaPlan
    age_s: float
    held_s: float

    @property
    def is_stale(self) -> bool:
        return self.age_s > PLAN_STALE_S


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision of the controller as the log keeps it, with the load it was made from.

    changed: false for the now and then recorded decision to leave things as they are.
    leader: the controller that decided. at_s: when, in seconds since the epoch by the store's
    clock; 0 until the store has it.
    """

    plan: ReplicaPlan
    load: ReplicaLoad
    changed: bool
    leader: str
    at_s: float = 0.0
