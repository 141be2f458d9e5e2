"""Records that the path of a token makes by the thousand a second."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A dataclass with slots that is frozen for the type checker alone.

    One that is frozen at run time too takes four to seven times as long to make (docs/experiments/engine.md).
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
