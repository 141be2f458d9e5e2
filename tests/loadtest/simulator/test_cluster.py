import math
from dataclasses import replace

import pytest

from loadtest.simulator.cluster import Cluster, Failure, Outage, Setting, needed_rounds
from loadtest.simulator.load import PROFILES, Mix, generate
from loadtest.simulator.parts import Hardware
from loadtest.simulator.scenarios import (
    ORACLE,
    PINNED,
    PLANS,
    SCENARIOS,
    Contender,
    Machine,
    Scenario,
    Slo,
    contenders,
    fixed,
    run,
    run_each,
)
from loadtest.simulator.tables import table_lines
from policies.cost import prior_yield
from policies.modes import DecodePlan, Mode
from policies.registry import create_policy
from router.config import AdmissionConfig

MACHINE = Machine.b200("8b")
TIGHT = Slo(1.0, 0.01)
THRESHOLD = {
    "stabilise": {"dwell_s": 0.4},
    "levels": [
        {"max_in_flight": 2, "mode": "diffusion", "block_length": 16, "threshold": 0.9},
        {"max_in_flight": 8, "mode": "self_speculation", "block_length": 8},
    ],
}


def some(num, rate, seed=0, profile="poisson", **mix):
    return generate(num, rate, profile, Mix(**mix), MACHINE.acceptance, seed)


def a_cluster(requests, num_replicas=4, policy="threshold", seed=0, **changes):
    plans = (*PLANS, DecodePlan(Mode.DIFFUSION, 16, 0.9))
    setting = Setting(
        num_replicas=num_replicas,
        hardware=Hardware(MACHINE.table, MACHINE.table.fitted, max_running=32),
        admission=AdmissionConfig(max_running=32, max_waiting=64, max_waiting_tokens=100_000),
        start=PLANS[0],
        believed_yields={plan: prior_yield(plan) for plan in plans},
        **changes,
    )
    parameters = THRESHOLD if policy == "threshold" else {}
    rounds = needed_rounds(plans, MACHINE.acceptance)
    return Cluster(setting, requests, rounds, create_policy(policy, parameters), seed)


def outcomes(record):
    finished = sum(not math.isnan(finish_s) for finish_s in record.finish_s)
    return finished + record.shed + record.unavailable + record.lost


@pytest.mark.parametrize("profile", PROFILES)
def test_arrivals_come_at_the_mean_rate_and_in_order(profile):
    requests = some(5000, 50.0, profile=profile)
    assert requests.arrival_s == sorted(requests.arrival_s)
    assert requests.arrival_s[-1] == pytest.approx(100.0, rel=0.1)


def test_a_flash_crowd_is_six_times_the_rest():
    requests = some(20_000, 50.0, profile="flash_crowd")
    end_s = requests.arrival_s[-1]
    crowd = sum(0.45 * end_s <= at_s < 0.55 * end_s for at_s in requests.arrival_s)
    assert crowd / len(requests) == pytest.approx(0.6 / 1.5, rel=0.05)


@pytest.mark.parametrize("seed", range(12))
def test_every_request_ends_once_whatever_fails(seed):
    requests = some(600, 120.0, seed, "bursty", pinned=((PLANS[0], 0.2),), prefix_share=0.5)
    failures = tuple(Failure(number, 1.0 + 0.3 * number, 0.5 + seed / 10) for number in range(seed % 5))
    cluster = a_cluster(requests, failures=failures, outages=(Outage(1.5, 2.0),), seed=seed)
    record = cluster.run()
    assert outcomes(record) == len(requests)
    for number, (first_s, finish_s) in enumerate(zip(record.first_s, record.finish_s, strict=True)):
        if not math.isnan(finish_s):
            assert requests.arrival_s[number] < first_s <= finish_s
    assert all(replica.num_in_flight == 0 for replica in cluster._replicas)
    assert all(router.traffic.in_flight(id_) == 0 for router in cluster._routers for id_ in cluster._ids)


def test_the_same_seed_gives_the_same_run():
    requests = some(400, 80.0, 1)
    first, second = a_cluster(requests, seed=1).run(), a_cluster(requests, seed=1).run()
    assert first.finish_s == second.finish_s
    assert a_cluster(requests, seed=2).run().finish_s != first.finish_s


def test_what_had_sent_nothing_survives_the_loss_of_its_replica_and_the_rest_is_lost():
    requests = some(300, 100.0, 4)
    record = a_cluster(requests, num_replicas=2, failures=(Failure(0, 1.0, 1.0),)).run()
    assert record.lost > 0
    assert record.lost == sum(
        math.isnan(finish_s) and not math.isnan(first_s)
        for first_s, finish_s in zip(record.first_s, record.finish_s, strict=True)
    )
    assert outcomes(record) == 300


def test_with_no_replica_left_requests_are_refused_as_unavailable():
    requests = some(200, 100.0, 4)
    failures = tuple(Failure(number, 0.5, 0.5) for number in range(2))
    record = a_cluster(requests, num_replicas=2, failures=failures).run()
    assert record.unavailable > 20
    assert record.shed == 0


def test_overload_is_shed_and_not_refused_as_unavailable():
    requests = some(2000, 800.0, 4)
    record = a_cluster(requests, num_replicas=2).run()
    assert record.shed > 200
    assert record.unavailable == 0


def test_without_redis_replicas_follow_their_own_load_and_requests_still_spread():
    """From the first moment on: no load is ever published, no plan ever written."""
    requests = some(600, 60.0, 5)
    record = a_cluster(requests, outages=(Outage(0.0, 1e9),)).run()
    assert outcomes(record) == 600
    assert not any(math.isnan(finish_s) for finish_s in record.finish_s)
    assert record.shifts > 0


def test_two_choices_keep_many_replicas_even():
    requests = some(4000, 64 * 16.0, 6)
    cluster = a_cluster(requests, num_replicas=64, policy="ar")
    went = [0] * 64
    for number, replica in enumerate(cluster._replicas):
        submit = replica.submit

        def counted(request, now_s, number=number, submit=submit):
            went[number] += 1
            submit(request, now_s)

        replica.submit = counted  # type: ignore[method-assign]
    cluster.run()
    assert sum(went) == 4000
    assert max(went) < 1.5 * 4000 / 64


class CountingReuse:
    """How many of the requests with a common text found it cached."""

    def __init__(self, cluster):
        self.num = self.hits = 0
        for replica in cluster._replicas:
            self.watch(replica)

    def watch(self, replica):
        reused = replica._reused

        def counted(request):
            tokens = reused(request)
            self.num += 1
            self.hits += tokens > 0
            return tokens

        replica._reused = counted


def test_a_common_text_is_found_again():
    """64 texts, and each replica keeps 16: by chance a quarter would be found; affinity finds most."""
    requests = some(1500, 4 * 10.0, 7, prefix_share=1.0)
    cluster = a_cluster(requests, policy="ar")
    counting = CountingReuse(cluster)
    cluster.run()
    assert counting.num == 1500
    assert counting.hits > 0.6 * 1500


def test_ar_keeps_its_pace_better_beside_its_own_kind():
    """Half the requests pin ar, half draft 32 tokens a step; with affinity most of ar has no such company."""
    half = Mix(pinned=((PLANS[0], 0.5), (DecodePlan(Mode.SELF_SPECULATION, 32), 0.5)))
    requests = generate(1500, 4 * 14.0, "poisson", half, MACHINE.acceptance, 8)
    with_affinity = a_cluster(requests).run()
    without = some_without_modes(requests)
    ar = [number for number, plan in enumerate(requests.pinned) if plan == PLANS[0]]
    assert mean_tpot(requests, with_affinity, ar) < mean_tpot(requests, without, ar)


def some_without_modes(requests):
    """The same requests placed as if nothing were known of their modes."""
    cluster = a_cluster(requests)
    known = requests.pinned
    place = cluster._place

    def blind(request, router_number, now_s):
        cluster._requests = replace(requests, pinned=[None] * len(known))
        try:
            place(request, router_number, now_s)
        finally:
            cluster._requests = requests

    cluster._place = blind  # type: ignore[method-assign]
    return cluster.run()


def mean_tpot(requests, record, numbers):
    return sum((record.finish_s[n] - record.first_s[n]) / (requests.output[n] - 1) for n in numbers) / len(
        numbers
    )


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario("idle", 2, 1.0),
        Scenario("near saturation", 2, 30.0),
        Scenario("past it", 2, 45.0),
        Scenario("varied", 2, 16.0, "bursty"),
        Scenario("pinned", 2, 25.0, mix=PINNED),
    ],
    ids=lambda scenario: scenario.name,
)
def test_no_policy_and_no_fixed_plan_beats_the_oracle(scenario):
    found = {o.policy: o.goodput for o in run_each(scenario, MACHINE, contenders(Slo()), 1200)}
    assert found[ORACLE] >= 0.99 * max(found.values())


def test_with_a_tight_target_knowledge_saves_a_third_of_what_the_best_fixed_plan_misses():
    rivals = (*map(fixed, PLANS), Contender(ORACLE))
    found = run_each(Scenario("s", 2, 13.0), MACHINE, rivals, 1500, slo=TIGHT)
    missed = {outcome.policy: 1.0 - outcome.good_share for outcome in found}
    assert missed[ORACLE] < 2 / 3 * min(missed[fixed(plan).title] for plan in PLANS)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_scenario_runs_in_small(scenario):
    small = replace(scenario, num_replicas=min(scenario.num_replicas, 8))
    found = [run(small, MACHINE, contender, 200) for contender in contenders(Slo())[-4:-1]]
    assert all(outcome.num_finished + outcome.num_shed + outcome.num_lost == 200 for outcome in found)
    assert len(list(table_lines(found))) == 4 + len(found) + 1
