"""What may fail, and what is told of it."""

import logging

import pytest

from policies.failures import Failures


def test_failures_are_kept_and_told_of_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures("adding up")
    done = []
    for number in range(3):
        with failures:
            done.append(number)
            raise ValueError(number)
    assert done == [0, 1, 2]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "adding up failed" in record.message
    assert record.exc_info is not None
    with failures:
        raise ValueError("another line")
    with failures:
        raise KeyError("another type")
    assert len(caplog.records) == 3


def test_what_is_no_exception_passes() -> None:
    failures = Failures("adding up")
    with pytest.raises(KeyboardInterrupt), failures:
        raise KeyboardInterrupt
    assert failures.num_in_row == 0


def test_failures_in_a_row_end_with_a_success() -> None:
    failures = Failures("adding up")
    counts = []
    for is_good in (False, False, True, True, False):
        with failures:
            if not is_good:
                raise ValueError
        counts.append(failures.num_in_row)
    assert counts == [1, 2, 0, 0, 1]
