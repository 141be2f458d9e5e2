import heapq
import random

import pytest

from policies.turnarounds import LASTING_S, Turnarounds


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


@pytest.mark.parametrize("num_clients", [1, 3, 16])
@pytest.mark.parametrize("seed", range(5))
def test_clients_of_a_closed_loop_are_always_all_there(num_clients, seed):
    """In flight and between, whoever it is that comes back; and the mean is theirs."""
    rng = random.Random(seed)
    turnarounds = Turnarounds()
    events = [(0.0, "arrived") for _ in range(num_clients)]
    num_in_flight, taken = 0, []
    while len(taken) < 600:
        now_s, event = heapq.heappop(events)
        if event == "arrived":
            turnarounds.arrived(now_s)
            num_in_flight += 1
            heapq.heappush(events, (now_s + rng.uniform(0.02, 0.2), "ended"))
        else:
            turnarounds.ended(now_s)
            num_in_flight -= 1
            taken.append(rng.uniform(0.005, 0.06))
            heapq.heappush(events, (now_s + taken[-1], "arrived"))
        if now_s > 0.0:
            assert num_in_flight + turnarounds.num_between(now_s) == num_clients
    assert turnarounds.mean_s == pytest.approx(0.0325, rel=0.35)
