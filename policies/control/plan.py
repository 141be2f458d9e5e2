"""The plan that a policy decided on for one replica, with its reason."""

from dataclasses import dataclass

from policies.modes import DecodePlan
from policies.replica_load import ReplicaLoad

PLAN_STALE_S = 1.5
"""The age past which a plan that is not confirmed has no leader behind it.

The take-over of a dead leader's lease takes less, so that it goes unnoticed.
"""

MAX_REASON_CHARS = 400
"""The length to which a policy's reason is cut before it is stored."""


def told(reason: str) -> str:
    """Returns a policy's reason as it is stored: cut, since a thousand are kept, and always valid text."""
    return reason[:MAX_REASON_CHARS].encode(errors="replace").decode()


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """The plan one replica follows for its `auto` requests."""

    version: int
    """A number that grows by one with each plan written for this replica; a replica never goes back."""
    decode: DecodePlan
    rule: str
    """The policy's name."""
    reason: str
    """One line for people, with the inputs that decided it."""
    input_age_s: float = 0.0
    """The age of the load that the decision was made from."""


@dataclass(frozen=True, slots=True)
class ObservedPlan:
    """A plan as read from the store; both times in seconds by the store's clock."""

    plan: ReplicaPlan
    age_s: float
    """The time since the leader last wrote or confirmed the plan."""
    held_s: float
    """The time since the plan last changed what to run."""

    @property
    def is_stale(self) -> bool:
        return self.age_s > PLAN_STALE_S


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision of the controller as the log keeps it, with the load it was made from."""

    plan: ReplicaPlan
    load: ReplicaLoad
    changed: bool
    """False for a decision to leave things as they are, recorded now and then."""
    leader: str
    """The controller that decided."""
    at_s: float = 0.0
    """The time of the decision, in seconds since the epoch by the store's clock; 0 until the store has it."""
