"""Records that are made by the thousand a second, or cross between router and replica."""

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A dataclass with slots that is frozen for the type checker alone.

    One that is frozen at run time too takes four to seven times as long to make (docs/experiments/engine.md).
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


@dataclass_transform(frozen_default=True)
def message(cls: type[T]) -> type[T]:
    """A frozen dataclass with slots, of two fields or more, which pickles as its class and its values.

    A dataclass's own pickling looks its fields up each time.
    """
    made = dataclass(frozen=True, slots=True)(cls)
    values = attrgetter(*(entry.name for entry in fields(made)))  # type: ignore[arg-type]

    def reduced(self: T) -> tuple[type[T], Any]:
        return made, values(self)

    made.__reduce__ = reduced  # type: ignore[assignment, method-assign]
    return made
