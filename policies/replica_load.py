"""What a replica says of its load, and how old that word is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter

from policies.cost import ReplicaCosts
from policies.modes import DecodePlan, Mode

FRESH_S = 1.0
"""A load at most this old is acted on as it is."""
LOST_S = 5.0
"""A load older than this says nothing any more."""


class Freshness(StrEnum):
    FRESH = "fresh"
    STALE = "stale"
    LOST = "lost"


def freshness(age_s: float) -> Freshness:
    if age_s <= FRESH_S:
        return Freshness.FRESH
    return Freshness.STALE if age_s <= LOST_S else Freshness.LOST


_AMOUNTS = attrgetter(
    "num_running",
    "num_waiting",
    "num_auto",
    "max_running",
    "pages_used",
    "num_pages",
    "waiting_prompt_tokens",
    "tokens_per_s",
    "plan_version",
    "decode_held_s",
    "num_lossless",
    "page_size",
    "max_step_tokens",
    "mean_context",
    "prefill_per_token",
    "num_ended",
    "silent_s",
)


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica's load at one moment, as it publishes it.

    num_auto counts the requests, running or waiting, whose mode the policy may choose; the
    others pin theirs. tokens_per_forward is a recent average by mode, of the modes that ran.
    Raises ValueError for an amount that is negative or no finite number, so that no such load is published
    or, where another version has, acted on.
    """

    replica_id: str
    num_running: int
    num_waiting: int
    num_auto: int
    max_running: int
    pages_used: int
    num_pages: int
    waiting_prompt_tokens: int = 0
    running_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    tokens_per_forward: Mapping[Mode, float] = field(default_factory=dict)
    tokens_per_s: float = 0.0
    plan_version: int = 0
    modes: tuple[Mode, ...] = tuple(Mode)
    """The modes the replica's model has."""
    decode: DecodePlan | None = None
    """What the replica's `auto` requests run now: its plan's, or its own choice while it had no plan."""
    decode_held_s: float = 0.0
    """For how long it has run that."""
    num_lossless: int = 0
    """Of num_auto, those kept to the modes whose output is AR's."""
    pinned_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    """The requests, running or waiting, that pin their mode."""
    page_size: int = 16
    max_step_tokens: int = 512
    mean_context: float = 0.0
    """Tokens in the cache, a running request."""
    mean_remaining: float | None = None
    """Tokens a running request is still expected to generate, by how long recent ones came to be and what
    max_tokens leaves it. None while none runs."""
    prefill_per_token: float = 0.0
    """Prompt tokens prefilled for each token generated, a recent average."""
    costs: ReplicaCosts | None = None
    """What its forwards cost and its rounds bring, as it has measured them itself."""
    num_tasks: int = 0
    """asyncio tasks in its process: what of them outlives the requests is a leak."""
    num_ended: int = 0
    """Choices that have ended since its start, in whatever way; from its rate every router foretells the
    wait for a place."""
    silent_s: float = 0.0
    """For how long its engine has been in the forward under way: so old was all this when published."""
    tokens_total_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    """Every token generated since the replica started, by mode, whatever became of its request; never
    less than it was under the same replica_id, which no other process ever has."""

    def __post_init__(self) -> None:
        amounts = (*_AMOUNTS(self), self.mean_remaining or 0.0, *self.tokens_per_forward.values())
        if not all(0 <= amount < math.inf for amount in amounts):
            raise ValueError(f"amounts must be finite and not negative: {amounts}")

    @property
    def num_in_flight(self) -> int:
        return self.num_running + self.num_waiting


@dataclass(frozen=True, slots=True)
class ObservedLoad:
    """A replica's load with its age in seconds, by the store's clock: since it was measured, not said."""

    load: ReplicaLoad
    age_s: float

    @property
    def freshness(self) -> Freshness:
        return freshness(self.age_s)


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """All replicas' loads as one reader saw them at once, ordered by replica id."""

    replicas: tuple[ObservedLoad, ...]

    def by_id(self) -> dict[str, ObservedLoad]:
        return {seen.load.replica_id: seen for seen in self.replicas}

    @property
    def num_in_flight(self) -> int:
        return sum(seen.load.num_in_flight for seen in self.replicas)
