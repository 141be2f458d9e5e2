import pytest

from loadtest.shapes import SHAPES, Diurnal, Ramp, Shape, ShapeError, Soak, Spike, Square, Steps, parse_shape


@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        (Soak(10.0, 3.0), {0.0: 3, 9.9: 3}),
        (Steps(30.0, (1.0, 5.0, 2.0)), {0.0: 1, 9.9: 1, 10.0: 5, 20.0: 2, 30.0: 2}),
        (Ramp(10.0, 2.0, 12.0), {0.0: 2, 5.0: 7, 10.0: 12}),
        (Ramp(10.0, 12.0, 2.0), {5.0: 7, 10.0: 2}),
        (Spike(30.0, 1.0, 9.0), {0.0: 1, 9.9: 1, 10.0: 9, 19.9: 9, 20.0: 1}),
        (Square(40.0, 1.0, 8.0, period_s=20.0), {0.0: 1, 9.9: 1, 10.0: 8, 20.0: 1, 30.0: 8}),
        (Diurnal(60.0, 2.0, 10.0, period_s=40.0), {0.0: 2, 10.0: 6, 20.0: 10, 40.0: 2}),
    ],
)
def test_levels(shape: Shape, levels: dict[float, float]) -> None:
    for at_s, level in levels.items():
        assert shape.level(at_s) == pytest.approx(level)


def test_every_shape_can_be_written() -> None:
    for name, shape in SHAPES.items():
        assert parse_shape(f"{name}:duration_s=30") == shape(30.0)
    assert parse_shape("steps:levels=1/2.5/4,duration_s=9") == Steps(9.0, (1.0, 2.5, 4.0))
    assert parse_shape("square:low=2,high=6,period_s=4,duration_s=9") == Square(9.0, 2.0, 6.0, 4.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sine:duration_s=3", "no shape 'sine'; the shapes are: soak, steps"),
        ("ramp:low=1", "ramp needs duration_s"),
        ("ramp:peak=1,duration_s=2", "'peak=1': write key=value with a key of ramp: duration_s, low, high"),
        ("ramp:low=x,duration_s=2", "low is written as in low=2.5"),
        ("steps:levels=1;2,duration_s=2", "levels is written as in levels=1/2/4"),
        ("soak:duration_s=0", "duration_s must be above 0"),
        ("square:period_s=0,duration_s=1", "period_s must be above 0"),
        ("soak:at=-1,duration_s=1", "at must be finite and not negative"),
        ("soak:at=nan,duration_s=1", "at must be finite"),
    ],
)
def test_a_bad_shape_says_what_to_change(text: str, problem: str) -> None:
    with pytest.raises(ShapeError, match=problem):
        parse_shape(text)
