"""Policies: pure functions from one replica's load to the plan that its `auto` requests should run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from policies.modes import DecodePlan
from policies.replica_load import ClusterLoad, ReplicaLoad

State = TypeVar("State")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The input of a decision for one replica."""

    load: ReplicaLoad
    current: DecodePlan | None = None
    """The plan that the replica runs now, None if it has run none yet."""
    cluster: ClusterLoad | None = None
    """The loads of all replicas; None where they are not known, as to a replica that decides for itself."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A policy's decision for one replica."""

    decode: DecodePlan
    reason: str
    """One line for people, with the inputs that decided it."""
    gain: float | None = None
    """The expected gain in goodput over `Snapshot.current` (0.1 is 10 %), where the policy knows it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan to run for a short span beside the one in force, so that what it brings is known."""

    plan: DecodePlan
    loss: float
    """The share of the tokens that is expected to be lost while it runs, above 0."""
    share: float
    """The largest share of a replica's tokens that all trials may lose."""
    change_s: float = 0.0
    """The time that is expected to be lost by changing to the plan and back."""


class PolicyParameters(BaseModel):
    """The base of every policy's parameters; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Policy(ABC, Generic[State]):
    """Decides for one replica at a time; the controller and a replica on its own run the same object.

    A policy holds its parameters only. Its memory of a replica is the state, which the caller keeps and
    gives back; `now_s` is any clock that only moves forward, the same one for all calls with one state.
    """

    name: str
    """The policy's name, shown as the rule in plans, logs and answers."""
    Parameters: ClassVar[type[PolicyParameters]] = PolicyParameters

    def __init__(self, parameters: PolicyParameters):
        self.parameters = parameters

    @abstractmethod
    def resume(self, current: DecodePlan | None, held_s: float, now_s: float) -> State:
        """Returns the state for a replica first seen now, which has run `current` for `held_s` seconds."""

    @abstractmethod
    def decide(self, snapshot: Snapshot, state: State, now_s: float) -> tuple[Decision, State]:
        """Returns the plan that the replica should run, and the state to pass next time. No side effects."""

    def trial(self, load: ReplicaLoad, running: DecodePlan) -> Trial | None:
        """Returns what a replica that runs `running` should try next, None for nothing.

        A trial shifts no plan. The replica asks with its own load, every period. No side effects.
        """
        return None
