import heapq
import random

import pytest

from policies.turnarounds import GRACE, LASTING_S, Turnarounds


def test_nobody_is_between_two_requests_before_any_has_ended():
    turnarounds = Turnarounds()
    turnarounds.arrived(1.0)
    assert turnarounds.num_between(1.0) == 0
    assert turnarounds.mean_s == 0.0


def test_a_client_that_comes_back_is_between_two_requests_until_then():
    turnarounds = Turnarounds()
    turnarounds.arrived(0.0)
    turnarounds.ended(1.0)
    assert turnarounds.num_between(1.01) == 1
    turnarounds.arrived(1.02)
    assert turnarounds.num_between(1.02) == 0
    assert turnarounds.mean_s == pytest.approx(0.02)


def test_a_client_that_does_not_come_back_has_gone():
    turnarounds = Turnarounds()
    turnarounds.ended(1.0)
    turnarounds.ended(1.2)
    assert turnarounds.num_between(1.0 + LASTING_S) == 1
    turnarounds.arrived(1.1 + LASTING_S)
    assert turnarounds.mean_s == pytest.approx(LASTING_S - 0.1), "of the one that may still come back"


def closed_loop(turnarounds, rng, num_clients, service_s, begin_s=0.0, num_requests=600):
    """Runs clients who ask, are answered and ask again; yields times, and how many are in flight."""
    events = [(begin_s, "arrived") for _ in range(num_clients)]
    num_in_flight = num_ended = 0
    while num_ended < num_requests:
        now_s, event = heapq.heappop(events)
        if event == "arrived":
            turnarounds.arrived(now_s)
            num_in_flight += 1
            heapq.heappush(events, (now_s + rng.uniform(*service_s), "ended"))
        else:
            turnarounds.ended(now_s)
            num_in_flight, num_ended = num_in_flight - 1, num_ended + 1
            heapq.heappush(events, (now_s + rng.uniform(0.005, 0.06), "arrived"))
        yield now_s, num_in_flight


@pytest.mark.parametrize(("num_clients", "lacking"), [(1, 0), (3, 0), (16, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_clients_of_a_closed_loop_are_all_there(num_clients, lacking, seed):
    """In flight and between, whoever it is that comes back; and the mean is theirs."""
    turnarounds = Turnarounds()
    for now_s, num_in_flight in closed_loop(turnarounds, random.Random(seed), num_clients, (0.02, 0.2)):
        if now_s > 0.0:
            found = num_in_flight + turnarounds.num_between(now_s)
            assert num_clients - lacking <= found <= num_clients
    assert turnarounds.mean_s == pytest.approx(0.0325, rel=0.4)


@pytest.mark.parametrize("service_s", [(0.001, 0.02), (0.05, 0.15), (0.4, 0.8)])
@pytest.mark.parametrize("seed", range(5))
def test_those_who_leave_are_not_renewed_by_those_who_stay(service_s, seed):
    turnarounds, rng = Turnarounds(), random.Random(seed)
    *_, (now_s, num_in_flight) = closed_loop(turnarounds, rng, 64, service_s)
    for _ in range(num_in_flight):
        turnarounds.ended(now_s)
    left_s, grace_s = now_s, GRACE * turnarounds.mean_s
    for now_s, num_in_flight in closed_loop(turnarounds, rng, 1, service_s, left_s, 100):
        if now_s > left_s + 2 * grace_s:
            assert num_in_flight + turnarounds.num_between(now_s) <= 6, "of 64, long before LASTING_S"
        if now_s > left_s + LASTING_S:
            assert num_in_flight + turnarounds.num_between(now_s) == 1
    assert turnarounds.mean_s == pytest.approx(0.0325, rel=0.4)
