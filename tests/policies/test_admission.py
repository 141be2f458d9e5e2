import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admission import MAX_RETRY_AFTER_S, Admit, Shed, admit


@pytest.mark.parametrize(
    ("num_in_flight", "expected"),
    [
        (0, Admit(queued=False)),
        (7, Admit(queued=False)),
        (8, Admit(queued=True)),
        (11, Admit(queued=True)),
        (12, Shed(1, contended=True)),
    ],
)
def test_run_then_queue_then_shed(num_in_flight, expected):
    assert admit(num_in_flight, capacity=8, max_queued=4) == expected


def test_no_capacity_is_not_contention():
    assert admit(0, capacity=0, max_queued=100) == Shed(1, contended=False)


def test_the_wait_follows_the_rate():
    assert admit(21, capacity=8, max_queued=4, completions_per_s=2.0) == Shed(5, contended=True)
    assert admit(500, capacity=8, max_queued=4, completions_per_s=0.1) == Shed(
        int(MAX_RETRY_AFTER_S), contended=True
    )


@given(st.integers(0, 100), st.integers(0, 50), st.integers(0, 50))
def test_never_more_in_flight_than_places_and_queue(num_in_flight, capacity, max_queued):
    answer = admit(num_in_flight, capacity, max_queued)
    if isinstance(answer, Admit):
        assert num_in_flight + 1 <= capacity + max_queued
    else:
        assert answer.retry_after_s >= 1
