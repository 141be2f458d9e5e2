"""What a policy decided for one replica, and why."""

from dataclasses import dataclass

from policies.modes import DecodePlan


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
