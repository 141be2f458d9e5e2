import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.modes import Mode
from router.placement import (
    MAX_COMPARED,
    MODE_WEIGHT,
    PREFIX_WEIGHT,
    TOKENS_A_REQUEST,
    Candidate,
    OwnTraffic,
    PlacementRequest,
    choose_replica,
    place,
    pressure,
)
from tests.policies.helpers import observed

RNG = random.Random(7)


def candidate(replica_id, num_in_flight=0, age_s=0.1, num_own=0, num_since=0, tokens_since=0, **changes):
    seen = observed(num_in_flight, replica_id, age_s, **changes)
    return Candidate(replica_id, seen, num_own, num_since, tokens_since)


def chosen(*candidates, rng=RNG, wanted=PlacementRequest()):  # noqa: B008
    return choose_replica(candidates, rng, wanted)


def placed(loads, rng, wanted=PlacementRequest(), traffic=None, now_s=10.0):  # noqa: B008
    """Where a request goes among replicas with these loads in sight."""
    seen = {load.load.replica_id: load for load in loads}
    return place(list(seen), traffic or OwnTraffic(), seen.get, now_s, rng, wanted)


def test_nobody_to_choose():
    assert chosen() is None
    assert placed([], RNG) is None


def test_the_least_loaded_by_place():
    assert chosen(candidate("a", 4), candidate("b", 3), candidate("c", 5)) == "b"
    assert chosen(candidate("small", 3, max_running=4), candidate("large", 4, max_running=16)) == "large"


def test_requests_sent_since_the_load_was_measured_count():
    assert chosen(candidate("a", 4), candidate("b", 3, num_own=2, num_since=2)) == "a"


def test_own_requests_count_even_if_the_load_does_not_show_them():
    assert chosen(candidate("a", 0, num_own=5), candidate("b", 4)) == "b"


def test_of_equal_ones_that_with_more_free_pages():
    assert chosen(candidate("a", 2, pages_used=90), candidate("b", 2, pages_used=10)) == "b"


def test_long_prompts_that_wait_weigh_more_than_short_ones():
    assert chosen(candidate("a", 3, waiting_prompt_tokens=9000), candidate("b", 4)) == "b"
    assert chosen(candidate("a", 3, waiting_prompt_tokens=900), candidate("b", 4)) == "a"
    assert chosen(candidate("a", 3, num_since=0, tokens_since=9000), candidate("b", 4)) == "b"


def test_ties_fall_at_random():
    equal = [candidate("a", 2), candidate("b", 2)]
    assert {choose_replica(equal, RNG) for _ in range(50)} == {"a", "b"}


def test_a_replica_that_has_the_prompt_is_preferred_while_it_is_not_much_fuller():
    wanted = PlacementRequest(held={"warm": 1.0})
    assert chosen(candidate("warm", 1), candidate("cold", 0), wanted=wanted) == "warm"
    assert chosen(candidate("warm", 3), candidate("cold", 0), wanted=wanted) == "cold"
    assert (
        chosen(candidate("warm", 1), candidate("cold", 0), wanted=PlacementRequest(held={"warm": 0.1}))
        == "cold"
    )


def test_a_request_in_ar_keeps_away_from_long_steps_and_a_long_one_from_ar():
    ar = candidate("ar", 4, running_by_mode={Mode.AR: 4})
    long = candidate("long", 3, running_by_mode={Mode.DIFFUSION: 2, Mode.SELF_SPECULATION: 1})
    assert chosen(ar, long) == "long"
    assert chosen(ar, long, wanted=PlacementRequest(Mode.AR)) == "ar"
    assert chosen(ar, long, wanted=PlacementRequest(Mode.SELF_SPECULATION)) == "long"


def test_company_is_no_reason_to_queue():
    full = candidate("full", 9, running_by_mode={Mode.AR: 8})
    long = candidate("long", 4, running_by_mode={Mode.DIFFUSION: 4})
    assert chosen(full, long, wanted=PlacementRequest(Mode.AR)) == "long"


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


candidates_ = st.lists(
    st.builds(
        candidate,
        st.uuids().map(str),
        st.integers(0, 20),
        num_own=st.integers(0, 20),
        running_by_mode=st.dictionaries(st.sampled_from(list(Mode)), st.integers(0, 8)),
        waiting_prompt_tokens=st.integers(0, 10_000),
    ),
    min_size=1,
    max_size=12,
)


@given(candidates_, st.data(), st.sampled_from([None, *Mode]), st.integers())
def test_affinity_never_costs_more_than_its_weight(some, data, mode, seed):
    ids = [one.replica_id for one in some]
    held = data.draw(st.dictionaries(st.sampled_from(ids), st.floats(0.0, 2.0)))
    best = choose_replica(some, random.Random(seed), PlacementRequest(mode, held))
    by_id = {one.replica_id: pressure(one) for one in some}
    assert by_id[best] <= min(by_id.values()) + PREFIX_WEIGHT + MODE_WEIGHT + 1e-9
    assert choose_replica(some, random.Random(seed), PlacementRequest(mode, held)) == best


@given(counts=st.lists(st.integers(0, 50), min_size=9, max_size=64), seed=st.integers())
def test_at_scale_the_most_loaded_is_never_chosen(counts, seed):
    counts[0] = 51
    many = [observed(count, f"r{index}") for index, count in enumerate(counts)]
    assert placed(many, random.Random(seed)) != "r0"


def test_at_scale_two_choices_keep_the_load_even():
    """1000 requests on 100 replicas with one stale picture among all: near 10 each, no herd."""
    rng = random.Random(1)
    traffic = OwnTraffic()
    many = [observed(0, f"r{index}") for index in range(100)]
    for _ in range(1000):
        traffic.started(placed(many, rng, traffic=traffic), now_s=10.0)
    assert max(traffic.in_flight(f"r{index}") for index in range(100)) <= 13


def test_at_scale_a_cached_prompt_is_found_and_a_hot_one_spills_over():
    rng = random.Random(1)
    traffic = OwnTraffic()
    many = [observed(0, f"r{index}", max_running=16) for index in range(100)]
    wanted = PlacementRequest(held={"r7": 1.0, "gone": 1.0})
    assert placed(many, rng, wanted, traffic) == "r7"
    went = Counter()
    for _ in range(200):
        replica_id = placed(many, rng, wanted, traffic)
        traffic.started(replica_id, now_s=10.0)
        went[replica_id] += 1
    assert 4 <= went["r7"] <= PREFIX_WEIGHT * 16 + 200 / 100 + 4
    assert "gone" not in went


def test_at_scale_a_choice_looks_at_a_handful():
    looked = []
    ids = [f"r{index}" for index in range(1000)]

    def seen(replica_id):
        looked.append(replica_id)
        return observed(0, replica_id)

    place(ids, OwnTraffic(), seen, 10.0, RNG, PlacementRequest(held={"r1": 1.0, "r2": 0.5, "r3": 0.4}))
    assert len(looked) <= 4 < MAX_COMPARED


def test_at_scale_a_fresh_replica_is_found_among_lost_ones():
    loads = [observed(0, f"r{index}", age_s=9.0) for index in range(99)] + [observed(5, "fresh")]
    assert {placed(loads, random.Random(seed)) for seed in range(5)} <= {"fresh"}


def test_own_traffic_counts_what_runs_and_what_was_sent_since_the_load():
    own = OwnTraffic()
    (first, _, _) = [own.started("a", now_s, 100) for now_s in (1.0, 2.0, 3.0)]
    own.ended(first, 1.5)
    seen = {"a": observed(1, "a", age_s=1.5)}
    (a, b) = own.candidates(["a", "b"], seen.get, now_s=3.5)
    assert (a.num_own, a.num_since, a.tokens_since, a.num_gone) == (2, 2, 200, 0)
    assert pressure(a) == (1 + 2 + 200 / TOKENS_A_REQUEST) / 8
    assert (b.seen, b.num_own, b.num_since) == (None, 0, 0)
    own.forget("a")
    assert own.in_flight("a") == 0


def test_what_has_ended_is_neither_sent_since_the_load_nor_still_at_the_replica():
    own = OwnTraffic()
    shown, _ = own.started("a", 1.0), own.started("a", 1.0)
    gone = own.started("a", 3.0, 100)
    own.ended(gone, 3.1)
    own.ended(shown, 3.2)
    (a,) = own.candidates(["a"], {"a": observed(5, "a", age_s=1.5)}.get, now_s=3.5)
    assert (a.num_own, a.num_since, a.tokens_since, a.num_gone) == (1, 0, 0, 1)
    assert a.num_in_flight == 4, "of the five that it shows one has ended since"


def test_a_request_counts_as_many_choices_as_it_has():
    own = OwnTraffic()
    sent = own.started("a", 3.0, 100, num=8)
    (a,) = own.candidates(["a"], {"a": observed(2, "a", age_s=1.0)}.get, now_s=3.5)
    assert (a.num_own, a.num_since, a.num_in_flight) == (8, 8, 10)
    own.ended(sent, 3.6)
    assert own.in_flight("a") == 0


def test_a_request_may_count_for_nothing_until_the_replica_has_accepted_it():
    own = OwnTraffic()
    sent = own.started("a", 3.0, 0, num=0)
    assert own.in_flight("a") == 0
    own.accepted(sent, 50, 2)
    (a,) = own.candidates(["a"], {"a": observed(0, "a", age_s=1.0)}.get, now_s=3.5)
    assert (a.num_own, a.num_since, a.tokens_since) == (2, 2, 50)
    own.ended(sent, 4.0)
    own.accepted(sent, 50, 2)
    assert own.in_flight("a") == 0, "an end may overtake the reply"


def test_a_prompt_that_has_begun_waits_no_more():
    own = OwnTraffic()
    sent = own.started("a", 3.0, 100)
    own.begun(sent)
    (a,) = own.candidates(["a"], {"a": observed(0, "a", age_s=1.0)}.get, now_s=3.5)
    assert (a.num_since, a.tokens_since) == (1, 0)


def test_the_totals_are_those_of_all_replicas():
    own = OwnTraffic()
    sent = [own.started(replica_id, 1.0, 100, num=3) for replica_id in "ab"]
    unsure = own.started("a", 1.0, 0, num=0)
    assert (own.num_in_flight, own.num_tokens_sent) == (6, 200)
    own.accepted(unsure, 50, 2)
    own.ended(sent[0], 2.0)
    assert (own.num_in_flight, own.num_tokens_sent) == (5, 250)


def test_what_is_remembered_of_ended_requests_is_no_older_than_a_load_may_be():
    own = OwnTraffic()
    for number in range(10_000):
        own.ended(own.started("a", number * 0.01), number * 0.01)
    assert len(own._ended["a"]) <= 501
    assert not own._sent["a"]
