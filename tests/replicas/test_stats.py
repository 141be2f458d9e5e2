import pytest

from policies.modes import Mode
from replicas.stats import WINDOW_S, DecodingStats


def test_rates_follow_and_fade() -> None:
    now_s = 0.0
    stats = DecodingStats(lambda: now_s)
    for second in range(1, 21):
        now_s = float(second)
        stats.update(
            30 * second,
            60 * second,
            {Mode.AR: 10 * second, Mode.DIFFUSION: 20 * second},
            {Mode.AR: 10 * second, Mode.DIFFUSION: 8 * second},
        )
    assert stats.tokens_per_s == pytest.approx(30, rel=0.01)
    assert stats.tokens_per_forward == pytest.approx({Mode.AR: 1.0, Mode.DIFFUSION: 2.5})
    now_s = 20.0 + 5 * WINDOW_S
    stats.update(600, 1200, {Mode.AR: 200, Mode.DIFFUSION: 400}, {Mode.AR: 200, Mode.DIFFUSION: 160})
    assert stats.tokens_per_s < 0.5
    assert stats.tokens_per_forward[Mode.DIFFUSION] == pytest.approx(2.5)


def test_a_second_reading_at_the_same_time_changes_nothing() -> None:
    stats = DecodingStats(lambda: 1.0)
    stats.update(10, 0, {Mode.AR: 10}, {Mode.AR: 10})
    assert stats.tokens_per_s == 0.0
