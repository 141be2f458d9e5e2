import random

import pytest

from loadtest.simulator.capacity import best_splits


@pytest.mark.parametrize("seed", range(20))
def test_no_two_loads_bring_more_than_the_best_split(seed: int) -> None:
    """By brute force: any two numbers of requests, in the shares that give the mean."""
    rng = random.Random(seed)
    rates = [rng.uniform(0.5, 1.5) * number**0.7 for number in range(1, 13)]
    loads = list(enumerate((0.0, *rates)))
    for mean, (made, low, high) in enumerate(best_splits(rates), start=1):
        most = max(
            a if low_load == high_load else a + (b - a) * (mean - low_load) / (high_load - low_load)
            for low_load, a in loads[: mean + 1]
            for high_load, b in loads[mean:]
        )
        assert made == pytest.approx(most)
        assert low <= mean <= high


def test_where_the_rate_is_concave_an_even_split_is_the_best() -> None:
    rates = [number**0.5 for number in range(1, 9)]
    assert best_splits(rates) == [(pytest.approx(rate), n, n) for n, rate in enumerate(rates, start=1)]
