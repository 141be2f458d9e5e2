import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission_control import (
    LOOK_PERIOD_S,
    MAX_RETRY_AFTER_S,
    AdmissionControl,
    Admit,
    Occupancy,
    Shed,
    admit,
)
from router.completion_rate import MIN_COMPLETIONS
from router.config import AdmissionConfig
from tests.policies.helpers import observed


def answer(num_in_flight, *, capacity=8, max_waiting=4, waiting_tokens=0, limits=None, **more):
    limits = limits or AdmissionConfig(max_waiting=max_waiting)
    return admit(Occupancy(1, capacity, num_in_flight, waiting_tokens), limits, **more)


@pytest.mark.parametrize(
    ("num_in_flight", "expected"),
    [(0, Admit(queued=False)), (7, Admit(queued=False)), (8, Admit(queued=True)), (11, Admit(queued=True))],
)
def test_run_then_queue(num_in_flight, expected):
    assert answer(num_in_flight) == expected


def test_then_shed_as_contended():
    shed = answer(12)
    assert (shed.contended, shed.retry_after_s) == (True, 1)


def test_no_capacity_is_not_contention():
    shed = answer(0, capacity=0, max_waiting=100)
    assert (shed.contended, shed.retry_after_s) == (False, 1)


def test_the_wait_follows_the_rate():
    assert answer(21, completions_per_s=2.0).retry_after_s == 5
    assert answer(500, completions_per_s=0.1).retry_after_s == int(MAX_RETRY_AFTER_S)


def test_prompt_tokens_that_wait_are_bounded_and_not_only_requests():
    limits = AdmissionConfig(max_waiting=100, max_waiting_tokens=1000)
    assert answer(9, waiting_tokens=900, limits=limits, num_prompt_tokens=100) == Admit(queued=True)
    shed = answer(9, waiting_tokens=900, limits=limits, num_prompt_tokens=101)
    assert shed.contended
    assert "900 prompt tokens" in shed.reason
    # Places are free, but nothing gets at them for prompts.
    assert isinstance(answer(2, waiting_tokens=900, limits=limits, num_prompt_tokens=101), Shed)


def test_a_prompt_longer_than_the_limit_is_taken_where_nothing_waits():
    limits = AdmissionConfig(max_waiting=100, max_waiting_tokens=1000)
    assert answer(2, limits=limits, num_prompt_tokens=5000) == Admit(queued=False)


def test_a_wait_past_the_queue_deadline_is_refused_at_once():
    limits = AdmissionConfig(max_waiting=100, max_queue_s=2.0)
    assert answer(27, limits=limits, completions_per_s=10.0) == Admit(queued=True)
    shed = answer(37, limits=limits, completions_per_s=10.0)
    assert (shed.contended, shed.retry_after_s) == (True, 1)
    assert "3 s" in shed.reason
    assert answer(37, limits=limits) == Admit(queued=True), "without a rate nothing can be foretold"


def test_a_request_that_would_spend_its_own_time_in_the_queue_is_told_so_now():
    limits = AdmissionConfig(max_waiting=100)
    assert answer(57, limits=limits, completions_per_s=10.0) == Admit(queued=True)
    assert isinstance(answer(57, limits=limits, completions_per_s=10.0, deadline_s=4.0), Shed)
    assert answer(57, limits=limits, completions_per_s=10.0, deadline_s=6.0) == Admit(queued=True)


@given(
    st.integers(0, 100),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 2000),
    st.none() | st.integers(1, 1000),
    st.integers(1, 500),
    st.none() | st.floats(0.01, 100.0),
)
def test_never_more_than_places_queue_and_tokens_allow(
    num_in_flight, capacity, max_waiting, waiting_tokens, max_tokens, num_prompt_tokens, rate
):
    verdict = admit(
        Occupancy(1, capacity, num_in_flight, waiting_tokens),
        AdmissionConfig(max_waiting=max_waiting, max_waiting_tokens=max_tokens),
        num_prompt_tokens=num_prompt_tokens,
        completions_per_s=rate,
    )
    if isinstance(verdict, Shed):
        assert 1 <= verdict.retry_after_s <= MAX_RETRY_AFTER_S
        assert verdict.contended == (capacity > 0)
        return
    assert num_in_flight + 1 <= capacity + max_waiting
    assert verdict.queued == (num_in_flight >= capacity)
    if max_tokens is not None and waiting_tokens:
        assert waiting_tokens + num_prompt_tokens <= max_tokens


class AppState:
    """An AdmissionControl over replicas with these loads, and how often it looked at each of them."""

    def __init__(self, *loads, **limits):
        self.control = AdmissionControl(AdmissionConfig(**{"max_running": 8, "max_waiting": 2, **limits}))
        self.loads = {load.load.replica_id: load for load in loads}
        self.num_looks = 0

    def check(self, now_s, **more):
        return self.control.check(list(self.loads), self.seen, now_s, **more)

    def seen(self, replica_id):
        self.num_looks += 1
        return self.loads[replica_id]


def test_own_requests_count_before_the_next_look():
    door = AppState(observed(7))
    verdicts, sent = [], []
    for _ in range(4):
        verdicts.append(door.check(0.0))
        sent.append(door.control.traffic.started("r1", 0.0))
    assert verdicts[:3] == [Admit(queued=False), Admit(queued=True), Admit(queued=True)]
    assert isinstance(verdicts[3], Shed)
    assert door.num_looks == 1
    door.control.traffic.ended(sent[0], 0.0)
    door.control.traffic.ended(sent[1], 0.0)
    assert door.check(0.0) == Admit(queued=True)
    assert door.num_looks == 1
    door.loads["r1"] = observed(7, age_s=0.0)
    assert door.check(LOOK_PERIOD_S) == Admit(queued=False)
    assert door.num_looks == 2


def test_a_replica_that_comes_is_seen_at_once():
    door = AppState(observed(10))
    assert isinstance(door.check(0.0), Shed)
    door.loads["r2"] = observed(0, "r2")
    assert door.check(0.0) == Admit(queued=False)
    door.loads.clear()
    assert door.check(0.0).contended is False


def test_a_replica_without_a_load_has_the_configured_places():
    control = AdmissionControl(AdmissionConfig(max_running=3, max_waiting=0))
    for _ in range(3):
        control.traffic.started("new", 0.0)
    assert control.check(["new"], {}.get, 0.0).contended


def test_the_rate_is_that_of_the_time_all_places_are_taken():
    """Ten a second while it is full; what ended before, in idle times, says nothing of the rate."""
    door = AppState(observed(3), max_waiting=100, max_queue_s=1.0)
    for number in range(10):
        door.loads["r1"] = observed(3, num_ended=50 * number)
        assert door.check(number / 10) == Admit(queued=False)
    door.loads["r1"] = observed(8 + 30, num_ended=1000)
    assert door.check(2.0) == Admit(queued=True), "nothing is known yet"
    for number in range(MIN_COMPLETIONS * 2):
        door.loads["r1"] = observed(8 + 30, num_ended=1000 + number)
        verdict = door.check(2.0 + number / 10)
    assert isinstance(verdict, Shed)
    assert verdict.retry_after_s in (2, 3)
    door.loads["r1"] = observed(8 + 7, num_ended=1020)
    assert door.check(4.0) == Admit(queued=True)


@pytest.mark.parametrize("num_routers", [1, 2, 4, 8])
def test_the_wait_foretold_is_the_same_however_many_routers_share_the_cluster(num_routers):
    """64 run, 40 wait, 20 end a second in all: a place in about 2 s, and nobody's patience is over."""
    control = AdmissionControl(AdmissionConfig(max_running=64, max_waiting=256, max_queue_s=2.5))
    now_s = 0.0
    while now_s < 30.0:
        now_s += num_routers / 20.0  # this router's share of what comes
        seen = observed(104, age_s=now_s % 0.2, max_running=64, num_ended=int(20 * (now_s - now_s % 0.2)))
        assert control.check(["r1"], {"r1": seen}.get, now_s) == Admit(queued=True)
    assert control._completions.per_s == pytest.approx(20.0, rel=0.05)


def test_places_freed_by_whatever_end_shorten_the_wait():
    """The count is of all ends, so that disconnects and failures are in it as much as whole answers."""
    door = AppState(observed(8 + 30, num_ended=0), max_waiting=100, max_queue_s=1.0)
    for number in range(20):
        door.loads["r1"] = observed(8 + 30, num_ended=10 * number)
        assert door.check(number / 10) == Admit(queued=True), "100 end a second"


def test_a_replica_that_leaves_or_begins_anew_does_not_disturb_the_rate():
    door = AppState(observed(20, "r1"), observed(20, "r2", num_ended=500), max_waiting=100)
    for number in range(30):
        door.loads["r1"] = observed(20, "r1", num_ended=number)
        door.loads["r2"] = observed(20, "r2", num_ended=(500 if number < 10 else 0) + number)
        if number == 20:
            del door.loads["r2"]
        door.check(number / 10)
        door.loads.setdefault("r2", observed(20, "r2", num_ended=number))
    assert door.control._completions.per_s == pytest.approx(20.0, rel=0.15)


@pytest.mark.parametrize(("rate", "each_s"), [(300, 0.05), (600, 0.05), (900, 0.05), (1000, 0.02)])
def test_nobody_is_refused_while_places_are_free_however_many_came_and_went(rate, each_s):
    """A load is published and read every 0.2 s, so it is up to 0.4 s old."""
    control = AdmissionControl(AdmissionConfig(max_running=64, max_waiting=0))
    live, shed, most = [], 0, 0
    published = read = (0.0, round(rate * each_s))
    next_publication_s, next_reading_s = 0.2, 0.3
    for number in range(rate * 3):
        now_s = number / rate
        while live and live[0][0] <= now_s:
            end_s, sent = live.pop(0)
            control.traffic.ended(sent, end_s)
        if now_s >= next_publication_s:
            published, next_publication_s = (now_s, len(live)), next_publication_s + 0.2
        if now_s >= next_reading_s:
            read, next_reading_s = published, next_reading_s + 0.2
        seen = observed(read[1], age_s=now_s - read[0], max_running=64)
        if isinstance(control.check(["r1"], {"r1": seen}.get, now_s), Shed):
            shed += now_s > 0.5  # it began with the first load's requests, which are nobody's here
            continue
        live.append((now_s + each_s, control.traffic.started("r1", now_s)))
        most = max(most, len(live))
    assert most < 64
    assert shed == 0


def test_choices_are_admitted_and_not_requests():
    """64 places and no queue: one request of 64 choices, or 64 of one, and no more."""
    for num in (1, 4, 16, 64):
        control = AdmissionControl(AdmissionConfig(max_running=64, max_waiting=0))
        seen, admitted = observed(0, age_s=0.0, max_running=64), 0
        for number in range(100):
            now_s = 0.001 + number * 1e-4
            if isinstance(control.check(["r1"], {"r1": seen}.get, now_s, num=num), Shed):
                break
            control.traffic.started("r1", now_s, num=num)
            admitted += num
        assert admitted == 64


def test_the_wait_of_many_choices_is_that_of_the_last():
    limits = AdmissionConfig(max_waiting=100)
    assert answer(8, limits=limits, num=20, completions_per_s=10.0, deadline_s=2.1) == Admit(queued=True)
    assert isinstance(answer(8, limits=limits, num=40, completions_per_s=10.0, deadline_s=2.1), Shed)
