"""Shapes of the load over time. A shape's level is requests/s to the open loop and users to locust."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar


class ShapeError(ValueError):
    """A shape that cannot be; the message says what to change."""


@dataclass(frozen=True)
class Shape(ABC):
    """A level over `duration_s` seconds, from 0. Levels are never negative."""

    duration_s: float

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple) else (value,)
            if not values or not all(math.isfinite(v) and v >= 0 for v in values):
                raise ShapeError(f"{self.name}: {field.name} must be finite and not negative, got {value}")
            if (field.name == "duration_s" or field.name.endswith("period_s")) and value == 0:
                raise ShapeError(f"{self.name}: {field.name} must be above 0")

    @abstractmethod
    def level(self, at_s: float) -> float:
        """The level at a time from 0 up to duration_s."""


@dataclass(frozen=True)
class Soak(Shape):
    """One level, held: a plateau to measure, or hours to find a leak."""

    at: float = 1.0
    name = "soak"

    def level(self, at_s: float) -> float:
        return self.at


@dataclass(frozen=True)
class Steps(Shape):
    """The levels one after another, each for the same time."""

    levels: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    name = "steps"

    def level(self, at_s: float) -> float:
        index = int(at_s / self.duration_s * len(self.levels))
        return self.levels[min(index, len(self.levels) - 1)]


@dataclass(frozen=True)
class Ramp(Shape):
    """Rises evenly from low to high."""

    low: float = 0.0
    high: float = 8.0
    name = "ramp"

    def level(self, at_s: float) -> float:
        return self.low + (self.high - self.low) * min(at_s / self.duration_s, 1.0)


@dataclass(frozen=True)
class Spike(Shape):
    """Stays low, but for a middle third of high."""

    low: float = 1.0
    high: float = 16.0
    name = "spike"

    def level(self, at_s: float) -> float:
        return self.high if 1 / 3 <= at_s / self.duration_s < 2 / 3 else self.low


@dataclass(frozen=True)
class Square(Shape):
    """Half of each period low, half high: what makes a policy without hysteresis thrash."""

    low: float = 1.0
    high: float = 8.0
    period_s: float = 20.0
    name = "square"

    def level(self, at_s: float) -> float:
        return self.low if at_s % self.period_s < self.period_s / 2 else self.high


@dataclass(frozen=True)
class Diurnal(Shape):
    """A day in period_s seconds: a sine from low (night, where it begins) to high and back."""

    low: float = 1.0
    high: float = 8.0
    period_s: float = 120.0
    name = "diurnal"

    def level(self, at_s: float) -> float:
        phase = (1 - math.cos(2 * math.pi * at_s / self.period_s)) / 2
        return self.low + (self.high - self.low) * phase


SHAPES: dict[str, type[Shape]] = {shape.name: shape for shape in (Soak, Steps, Ramp, Spike, Square, Diurnal)}


def parse_shape(text: str) -> Shape:
    """Parses `name:key=value,...`, as in `square:low=1,high=8,period_s=20,duration_s=120`; levels by `/`.

    Raises ShapeError, which says what to change.
    """
    name, _, rest = text.partition(":")
    shape = SHAPES.get(name)
    if shape is None:
        raise ShapeError(f"no shape '{name}'; the shapes are: {', '.join(SHAPES)}")
    known = {field.name: field for field in fields(shape)}
    given: dict[str, float | tuple[float, ...]] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            raise ShapeError(f"'{item}': write key=value with a key of {name}: {', '.join(known)}")
        read: Callable[[str], float | tuple[float, ...]] = _numbers if key == "levels" else float
        try:
            given[key] = read(value)
        except ValueError:
            example = "1/2/4" if key == "levels" else "2.5"
            raise ShapeError(f"'{item}': {key} is written as in {key}={example}") from None
    for key, field in known.items():
        if field.default is MISSING and key not in given:
            raise ShapeError(f"{name} needs {key}, as in {name}:{key}=60")
    return shape(**given)  # type: ignore[arg-type]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split("/"))
