from hypothesis import given
from hypothesis import strategies as st

from router.ejection import EJECTED_S, MAX_EJECTED_S, MAX_FAILURES, FailureWatch

BOTH = ["good", "sick"]


def failing(num=MAX_FAILURES, now_s=0.0, watch=None):
    watch = watch or FailureWatch()
    for _ in range(num):
        watch.failed("sick", now_s)
    return watch


def test_a_replica_that_fails_a_few_in_a_row_is_left_out_for_a_while():
    watch = failing(MAX_FAILURES - 1)
    assert watch.trusted(BOTH, 0.0) == BOTH
    watch.failed("sick", 0.0)
    assert watch.trusted(BOTH, 0.0) == ["good"]
    assert watch.trusted(BOTH, EJECTED_S - 0.1) == ["good"]
    assert watch.trusted(BOTH, EJECTED_S) == BOTH


def test_failures_between_answers_leave_nobody_out():
    watch = FailureWatch()
    for _ in range(20):
        failing(MAX_FAILURES - 1, watch=watch)
        watch.succeeded("sick")
    assert watch.trusted(BOTH, 0.0) == BOTH


def test_one_that_fails_again_is_left_out_for_longer_up_to_a_bound_until_it_answers():
    watch = failing()
    now_s = EJECTED_S
    for wait_s in (10.0, 20.0, 40.0, MAX_EJECTED_S, MAX_EJECTED_S):
        watch.failed("sick", now_s)
        assert watch.is_ejected("sick", now_s + wait_s - 0.1)
        assert not watch.is_ejected("sick", now_s + wait_s)
        now_s += wait_s
    watch.succeeded("sick")
    failing(MAX_FAILURES - 1, now_s, watch)
    assert watch.trusted(BOTH, now_s) == BOTH


def test_what_was_under_way_when_it_was_left_out_does_not_prolong_that():
    watch = failing(1000)
    assert not watch.is_ejected("sick", EJECTED_S)


def test_where_all_fail_all_are_tried():
    watch = failing()
    assert watch.trusted(["sick"], 0.0) == ["sick"]
    watch.forget("sick")
    assert watch.trusted(BOTH, 0.0) == BOTH


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0.0, 30.0)), max_size=60))
def test_somebody_is_always_trusted_and_nobody_left_out_for_ever(outcomes):
    watch, now_s = FailureWatch(), 0.0
    for replica_id, is_well, wait_s in outcomes:
        now_s += wait_s
        watch.succeeded(replica_id) if is_well else watch.failed(replica_id, now_s)
        assert watch.trusted(["a", "b", "c"], now_s)
    assert watch.trusted(["a", "b", "c"], now_s + MAX_EJECTED_S) == ["a", "b", "c"]
