"""The load that a replica publishes, and its age as others see it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter

from policies.cost import ReplicaCosts
from policies.modes import DecodePlan, Mode

FRESH_S = 1.0
"""The age up to which a load is acted on as it is."""
LOST_S = 5.0
"""The age past which a load says nothing any more."""


class Freshness(StrEnum):
    """The use of a load at its age: fresh is acted on, stale shifts no plan, lost says nothing any more."""

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
    "num_between",
    "turnaround_s",
)


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica's load at one moment, as it publishes it.

    Raises ValueError for an amount that is negative or no finite number, so that no such load is published
    or, where another version has published one, acted on.
    """

    replica_id: str
    num_running: int
    num_waiting: int
    num_auto: int
    """Requests, running or waiting, whose mode the policy may choose; the others pin theirs."""
    max_running: int
    pages_used: int
    num_pages: int
    waiting_prompt_tokens: int = 0
    running_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    tokens_per_forward: Mapping[Mode, float] = field(default_factory=dict)
    """Tokens a forward, a recent average by mode, of the modes that ran."""
    tokens_per_s: float = 0.0
    plan_version: int = 0
    modes: tuple[Mode, ...] = tuple(Mode)
    """The modes the replica's model has."""
    decode: DecodePlan | None = None
    """The plan that the replica's `auto` requests run now, the controller's or its own choice without one."""
    decode_held_s: float = 0.0
    """The time for which the replica has run that plan."""
    num_lossless: int = 0
    """Requests of num_auto that are kept to the modes whose output is AR's."""
    pinned_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    """Requests, running or waiting, that pin their mode, by that mode."""
    page_size: int = 16
    max_step_tokens: int = 512
    mean_context: float = 0.0
    """Tokens in the cache of a running request, on average."""
    mean_remaining: float | None = None
    """Tokens that a running request is still expected to generate, by the length of recent ones and what
    max_tokens leaves it. None while none runs."""
    mean_completion: float | None = None
    """Tokens of a completion, an average of recent ones. None before one has ended."""
    prefill_per_token: float = 0.0
    """Prompt tokens prefilled for each token generated, a recent average."""
    costs: ReplicaCosts | None = None
    """The costs of the replica's forwards and the yields of its rounds, as it has measured them itself."""
    num_tasks: int = 0
    """The asyncio tasks in the replica's process; those that outlive the requests are a leak."""
    num_ended: int = 0
    """Choices that have ended since the replica's start, in whatever way; from the rate of this number every
    router foretells the wait for a place."""
    silent_s: float = 0.0
    """The time that the engine has spent in the forward under way, which is the load's age at publication."""
    num_between: int = 0
    """Clients whose last request has ended here and whose next is to come, as far as can be told
    (policies.turnarounds)."""
    turnaround_s: float = 0.0
    """Seconds that a client is between two requests, on average."""
    risk: float | None = None
    """The risk of the checkpoint's learned sampler (policies.modes), by which diffusion decodes unless
    something else is asked for; None where the checkpoint has none."""
    tokens_total_by_mode: Mapping[Mode, int] = field(default_factory=dict)
    """Every token generated since the replica started, by mode, whatever became of its request; never
    less than it was under the same replica_id, which no other process ever has."""
    host_s: float = 0.0
    """CPU seconds that the engine's thread has taken beside forwards since the replica started."""

    def __post_init__(self) -> None:
        optional = self.mean_remaining or 0.0, self.mean_completion or 0.0, self.risk or 0.0
        amounts = (*_AMOUNTS(self), *optional, *self.tokens_per_forward.values())
        if not all(0 <= amount < math.inf for amount in amounts):
            raise ValueError(f"amounts must be finite and not negative: {amounts}")

    @property
    def num_in_flight(self) -> int:
        return self.num_running + self.num_waiting

    @property
    def num_clients(self) -> int:
        """Requests in flight, and clients between two."""
        return self.num_in_flight + self.num_between

    @property
    def clients_per_request(self) -> float:
        """Clients for each request in flight, whatever its kind; 1 while none is."""
        return self.num_clients / self.num_in_flight if self.num_in_flight else 1.0

    @property
    def num_auto_clients(self) -> float:
        """Clients whose requests' mode the policy may choose; all, where nothing is in flight."""
        return self.num_auto * self.clients_per_request if self.num_in_flight else float(self.num_between)


@dataclass(frozen=True, slots=True)
class ObservedLoad:
    """A replica's load as another process sees it."""

    load: ReplicaLoad
    age_s: float
    """The seconds since the load was measured, not published, by the store's clock."""

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
