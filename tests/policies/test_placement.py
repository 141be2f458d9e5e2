import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.placement import Candidate, OwnTraffic, choose_replica
from tests.policies.helpers import observed

RNG = random.Random(7)


def candidate(replica_id, num_in_flight=0, age_s=0.1, num_own=0, num_since=0, **changes):
    return Candidate(replica_id, observed(num_in_flight, replica_id, age_s, **changes), num_own, num_since)


def chosen(*candidates, rng=RNG):
    return choose_replica(candidates, rng)


def test_nobody_to_choose():
    assert chosen() is None


def test_the_least_loaded_by_place():
    assert chosen(candidate("a", 4), candidate("b", 3), candidate("c", 5)) == "b"
    assert chosen(candidate("small", 3, max_running=4), candidate("large", 4, max_running=16)) == "large"


def test_requests_sent_since_the_load_was_measured_count():
    assert chosen(candidate("a", 4), candidate("b", 3, num_own=2, num_since=2)) == "a"


def test_own_requests_count_even_if_the_load_does_not_show_them():
    assert chosen(candidate("a", 0, num_own=5), candidate("b", 4)) == "b"


def test_of_equal_ones_that_with_more_free_pages():
    assert chosen(candidate("a", 2, pages_used=90), candidate("b", 2, pages_used=10)) == "b"


def test_ties_fall_at_random():
    equal = [candidate("a", 2), candidate("b", 2)]
    assert {choose_replica(equal, RNG) for _ in range(50)} == {"a", "b"}


@pytest.mark.parametrize(
    ("better_age_s", "worse_age_s"),
    [(0.5, 3.0), (3.0, 6.0), (0.5, 6.0)],
    ids=["fresh before stale", "stale before lost", "fresh before lost"],
)
def test_the_fresher_goes_first_though_busier(better_age_s, worse_age_s):
    assert chosen(candidate("busy", 30, better_age_s), candidate("idle", 0, worse_age_s)) == "busy"


def test_a_replica_that_has_not_published_yet_waits_its_turn():
    assert chosen(candidate("known", 30), Candidate("new")) == "known"


def test_with_all_lost_own_counts_decide_and_not_chance():
    """As when Redis is down: the last known loads mean nothing, the router's own requests do."""
    lost = [candidate("a", 0, 60.0, num_own=3), candidate("b", 50, 60.0, num_own=1), Candidate("c", None, 2)]
    assert {choose_replica(lost, RNG) for _ in range(50)} == {"b"}


@given(counts=st.lists(st.integers(0, 50), min_size=9, max_size=64), seed=st.integers())
def test_at_scale_the_most_loaded_is_never_chosen(counts, seed):
    counts[0] = 51
    many = [candidate(f"r{index}", count) for index, count in enumerate(counts)]
    assert choose_replica(many, random.Random(seed)) != "r0"


def test_at_scale_two_choices_keep_the_load_even():
    """1000 requests on 100 replicas with one stale picture among all: near 10 each, no herd."""
    rng = random.Random(1)
    sent = OwnTraffic()
    ids = [f"r{index}" for index in range(100)]
    seen = [observed(0, replica_id) for replica_id in ids]
    for _ in range(1000):
        sent.started(choose_replica(sent.candidates(ids, seen, now_s=10.0), rng), now_s=10.0)
    assert max(sent.in_flight(replica_id) for replica_id in ids) <= 13


def test_own_traffic_counts_what_runs_and_what_was_sent_since_the_load():
    own = OwnTraffic()
    for now_s in (1.0, 2.0, 3.0):
        own.started("a", now_s)
    own.ended("a")
    (a, b) = own.candidates(["a", "b"], [observed(1, "a", age_s=1.5)], now_s=3.5)
    assert (a.num_own, a.num_since) == (2, 2)
    assert (b.seen, b.num_own, b.num_since) == (None, 0, 0)
    own.forget("a")
    assert own.in_flight("a") == 0
