import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import (
    Arrival,
    TraceError,
    coefficient_of_variation,
    fixed_rate,
    gamma,
    poisson,
    read_trace,
    write_trace,
)
from loadtest.shapes import Diurnal, Ramp, Spike, Square, Steps


def times(arrivals: tuple[Arrival, ...]) -> np.ndarray:
    return np.array([a.at_s for a in arrivals])


def test_poisson_has_its_rate_and_exponential_gaps() -> None:
    arrivals = poisson(50.0, 200.0, seed=3)
    assert len(arrivals) == pytest.approx(10_000, abs=4 * math.sqrt(10_000))
    gaps = np.diff(times(arrivals))
    # The Kolmogorov-Smirnov distance to the exponential distribution; 1.63/sqrt(n) is its 1 % point.
    found = np.sort(gaps)
    ranks = np.arange(1, len(found) + 1) / len(found)
    assert np.abs(ranks - (1 - np.exp(-50.0 * found))).max() < 1.63 / math.sqrt(len(found))


@pytest.mark.parametrize("burstiness", [0.1, 0.5, 1.0, 4.0])
def test_burstiness_sets_how_gaps_vary_and_not_how_many(burstiness: float) -> None:
    arrivals = gamma(20.0, 2000.0, burstiness=burstiness, seed=7)
    spread = 1 / math.sqrt(burstiness)
    assert coefficient_of_variation(arrivals) == pytest.approx(spread, rel=0.06)
    assert len(arrivals) == pytest.approx(40_000, abs=4 * spread * math.sqrt(40_000))


def test_a_seed_fixes_the_arrivals() -> None:
    assert poisson(5.0, 60.0, seed=1) == poisson(5.0, 60.0, seed=1)
    assert poisson(5.0, 60.0, seed=1) != poisson(5.0, 60.0, seed=2)


@pytest.mark.parametrize(
    "shape",
    [
        Steps(400.0, (5.0, 40.0, 10.0)),
        Ramp(400.0, 0.0, 60.0),
        Spike(300.0, 2.0, 50.0),
        Square(400.0, 5.0, 45.0, period_s=100.0),
        Diurnal(400.0, 2.0, 60.0, period_s=200.0),
    ],
)
def test_arrivals_follow_the_shape(shape: Steps | Ramp | Spike | Square | Diurnal) -> None:
    """Counts in windows of 10 s against the shape's own integral, by brute force."""
    at_s = times(poisson(shape, seed=11))
    assert (np.diff(at_s) > 0).all()
    for start in np.arange(0.0, shape.duration_s, 10.0):
        expected = sum(shape.level(start + 0.005 + 0.01 * k) * 0.01 for k in range(1000))
        found = ((at_s >= start) & (at_s < start + 10.0)).sum()
        assert abs(found - expected) <= 4.5 * math.sqrt(expected) + 1


@given(
    rate=st.floats(0.0, 50.0), duration_s=st.floats(0.001, 30.0), burstiness=st.floats(0.05, 20.0),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_arrivals_are_in_order_and_within_the_duration(
    rate: float, duration_s: float, burstiness: float, seed: int
) -> None:
    at_s = times(gamma(rate, duration_s, burstiness=burstiness, seed=seed))
    assert (np.diff(at_s) >= 0).all()
    assert ((at_s >= 0) & (at_s < duration_s)).all()


def test_a_rate_of_nothing_is_no_arrivals() -> None:
    assert poisson(0.0, 10.0) == ()
    assert fixed_rate(0.0, 10.0) == ()


def test_fixed_rate_is_even() -> None:
    assert [a.at_s for a in fixed_rate(4.0, 1.0)] == [0.0, 0.25, 0.5, 0.75]


def test_wrong_arguments_say_what_to_change() -> None:
    with pytest.raises(ValueError, match="needs duration_s"):
        poisson(1.0)
    with pytest.raises(ValueError, match="leave duration_s out"):
        poisson(Ramp(10.0), 10.0)
    with pytest.raises(ValueError, match="burstiness must be above 0"):
        gamma(1.0, 10.0, burstiness=0.0)
    with pytest.raises(ValueError, match="at must be finite and not negative"):
        poisson(-1.0, 10.0)


def test_a_trace_is_read_in_time_order_from_its_first_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 12.0, "prompt_len": 30, "output_len": 5, "class": "batch"},
        {"timestamp": 10.0, "prompt_len": 7},
        {"timestamp": 10.5, "other": "ignored"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_trace(path, speed=2.0) == (
        Arrival(0.0, 7),
        Arrival(0.25),
        Arrival(1.0, 30, 5, "batch"),
    )
    assert len(read_trace(path, limit=2)) == 2


def test_mooncake_traces_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46]}\n')
    assert read_trace(path, unit_s=0.001) == (Arrival(0.0, 6955, 52),)


def test_a_written_trace_reads_back(tmp_path: Path) -> None:
    arrivals = (Arrival(0.0, 3, 4, "chat"), *poisson(10.0, 5.0, seed=2))
    path = tmp_path / "trace.jsonl"
    write_trace(arrivals, path)
    assert read_trace(path) == arrivals


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no requests"),
        ("[1]\n", ":1: a line is a JSON object"),
        ('{"timestamp": 1}\nnonsense\n', ":2: not JSON"),
        ('{"prompt_len": 3}\n', "timestamp must be a number, got None"),
        ('{"timestamp": true}\n', "timestamp must be a number"),
        ('{"timestamp": 1, "output_len": 0}\n', "output_len must be a whole number"),
        ('{"timestamp": 1, "class": 3}\n', "class must be a string"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError, match=problem):
        read_trace(path)
