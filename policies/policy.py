"""What a policy is: a pure function from one replica's load to what its `auto` requests should run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from policies.modes import DecodePlan
from policies.replica_load import ClusterLoad, ReplicaLoad

State = TypeVar("State")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a decision is made from.

    current: what the replica runs now, None if nothing yet. cluster: the other replicas, where
    they are known; a replica that decides for itself has none.
    """

    load: ReplicaLoad
    current: DecodePlan | None = None
    cluster: ClusterLoad | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """reason: one line for people, with the inputs that decided it.

    gain: the expected gain in goodput over `Snapshot.current` (0.1 is 10 %), where the policy knows it.
    """

    decode: DecodePlan
    reason: str
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class ExploredPlans:
    """Plans to explore now and then, in turn, beside the one in force, so that what they bring stays known.

    share: of a replica's forwards, at most so many explore.
    """

    plans: tuple[DecodePlan, ...]
    share: float


class PolicyParameters(BaseModel):
    """Base of every policy's parameters: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Policy(ABC, Generic[State]):
    """Decides for one replica at a time; the controller and a replica on its own run the same object.

    A policy holds its parameters only. What it remembers of a replica is in the state, which the
    caller keeps and gives back; `now_s` is any clock that only moves forward, the same one for all
    calls with one state.
    """

    name: str
    """The rule shown in plans, logs and answers."""
    Parameters: ClassVar[type[PolicyParameters]] = PolicyParameters

    def __init__(self, parameters: PolicyParameters):
        self.parameters = parameters

    @abstractmethod
    def resume(self, current: DecodePlan | None, held_s: float, now_s: float) -> State:
        """The state for a replica first seen now, which has run `current` for `held_s` seconds."""

    @abstractmethod
    def decide(self, snapshot: Snapshot, state: State, now_s: float) -> tuple[Decision, State]:
        """What the replica should run, and the state to pass next time. No side effects."""

    def explored_plans(self, load: ReplicaLoad, running: DecodePlan) -> ExploredPlans | None:
        """The plans that a replica which runs this one should explore; None for none. It shifts no plan.

        The replica asks with its own load, every period. No side effects.
        """
        return None
