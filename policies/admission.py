"""Whether to take a request at all."""

import math
from dataclasses import dataclass

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 30.0


@dataclass(frozen=True, slots=True)
class Admit:
    """queued: it will wait for a place to run."""

    queued: bool


@dataclass(frozen=True, slots=True)
class Shed:
    """contended: the cluster is full and the client should come back (429); else it has no capacity (503).

    retry_after_s: whole seconds.
    """

    retry_after_s: int
    contended: bool


Admission = Admit | Shed


def admit(
    num_in_flight: int, capacity: int, max_queued: int, completions_per_s: float | None = None
) -> Admission:
    """Decide on one more request.

    num_in_flight: requests running or waiting, without this one. capacity: requests that can run at
    once at the replicas that can be reached. max_queued: how many more may wait.
    completions_per_s: the recent rate, from which the wait for a place is estimated.
    """
    if capacity <= 0:
        return Shed(retry_after_s=math.ceil(MIN_RETRY_AFTER_S), contended=False)
    if num_in_flight < capacity:
        return Admit(queued=False)
    num_too_many = num_in_flight + 1 - (capacity + max_queued)
    if num_too_many <= 0:
        return Admit(queued=True)
    wait_s = num_too_many / completions_per_s if completions_per_s else MIN_RETRY_AFTER_S
    wait_s = min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
    return Shed(retry_after_s=math.ceil(wait_s), contended=True)
