"""How far long work has come, in the log."""

import logging

import pytest

from replicas.progress import EVERY_S, logged

logger = logging.getLogger("replicas.test")


def told(seconds: list[float], caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines where the items are dealt with at these times."""
    times = iter([0.0, *seconds])
    with caplog.at_level(logging.INFO):
        items = list(logged("abcd"[: len(seconds)], len(seconds), "warming up", logger, lambda: next(times)))
    assert items == list("abcd"[: len(seconds)])
    return caplog.messages


def test_short_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert told([0.1, 0.2, 0.3], caplog) == []


def test_long_work_is_told_now_and_then_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    late = [EVERY_S, EVERY_S + 0.1, 2.5 * EVERY_S, 2.5 * EVERY_S + 0.1]
    assert told(late, caplog) == [
        "warming up: 1 of 4 after 2 s",
        "warming up: 3 of 4 after 5 s",
        "warming up: 4 of 4 after 5 s",
    ]


def test_nothing_to_do_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    assert told([], caplog) == []
