"""The oracle: what a choice of plan could have brought, known afterwards; a bound to hold policies against.

It is the best, with hindsight, of every fixed plan and of several clairvoyant choices. A clairvoyant knows
what no policy can: the true costs, of the very requests at a replica the acceptance that each is going
to have and how long it will be, and when each is due. So its queues are those its own choices made. It
chooses five times a second, without delay or dwell.

Short of saturation the most requests on time now is also the best later; near it a fast plan now saves
those that come. Where to change from the one to the other depends on what is going to come, so it is
tried at several levels, and hindsight takes the best.
"""

import math
from collections.abc import Sequence

from loadtest.simulator.cluster import Decide
from loadtest.simulator.replica import PREFILL_SHARE, SimulatedReplica
from policies.modes import DecodePlan
from policies.replica_load import ReplicaLoad

RELIEFS = (0.0, 16.0, 48.0, math.inf)


def clairvoyant(plans: Sequence[DecodePlan], tpot_s: float, relief: float) -> Decide:
    """Chooses the plan that brings most of the requests there to their end in time, of such the fastest.

    relief: with more than so many requests in flight, or some that wait, it chooses the fastest
    """

    def decide(replica: SimulatedReplica, load: ReplicaLoad, now_s: float) -> DecodePlan:
        is_pressed = replica.num_in_flight > relief or replica.num_waiting > 0
        best, best_worth = replica.plan, (-1, -1.0)
        for plan in plans:
            rate, num_good = truth(replica, plan, tpot_s, now_s)
            worth = (0 if is_pressed else num_good, rate * (1.01 if plan == replica.plan else 1.0))
            if worth > best_worth:
                best, best_worth = plan, worth
        return best

    return decide


def truth(replica: SimulatedReplica, plan: DecodePlan, tpot_s: float, now_s: float) -> tuple[float, int]:
    """Tokens a second, and how many requests end in time, if all `auto` requests ran this plan from now on.

    In time is tpot_s for each token after the first.
    """
    requests, hardware = replica.requests, replica.hardware
    queries = wanted = 0.0
    paces, needed = [], []
    for request, left, first_s in replica.progress():
        own = requests.pinned[request] or plan
        rounds = replica.rounds[own]
        chance = requests.chance[request]
        rows = rounds.rows[chance]
        paces.append(rounds.paces[chance])
        queries += rows
        wanted += rounds.wanted(rows)
        left_s = first_s + tpot_s * (requests.output[request] - 1) - now_s
        needed.append(left / left_s if left_s > 0 else math.inf)
    num = len(paces)
    if not num:
        return 0.0, 0
    budget, per_token = hardware.max_step_tokens, replica.prefill_per_token
    most = min(budget, hardware.max_prefill_tokens)
    room = budget - min(most, budget // PREFILL_SHARE) if per_token else budget
    share = min(1.0, room / queries)
    made = sum(paces) * share
    prefill = min(per_token * made, most, budget - queries * share)
    cached, wanted = replica.num_cached * share, wanted * share
    ms = hardware.table.ms(num * share, queries * share + prefill, cached, wanted)
    steps_per_s = 1000.0 * share / ms
    num_good = sum(pace * steps_per_s >= need for pace, need in zip(paces, needed, strict=True))
    return 1000.0 * made / ms, num_good
