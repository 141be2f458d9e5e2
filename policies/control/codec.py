"""JSON codecs of what the store holds: written strictly, read with tolerance.

Every entry carries its format's version. A reader ignores keys it does not know and fills in
missing ones that have defaults; anything else amiss makes the entry malformed.
"""

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from policies.control.plan import DecisionRecord, ReplicaPlan
from policies.replica_load import ReplicaLoad

Body = TypeVar("Body")


class MalformedEntry(ValueError):
    """Raised for a text that is no entry this version can read."""


@dataclass(frozen=True, slots=True)
class _Envelope(Generic[Body]):
    """The outer form of every entry: the version of its format, and the record."""

    v: Literal[1]
    body: Body


class Codec(Generic[Body]):
    """Translates one kind of record to its text and back."""

    def __init__(self, adapter: TypeAdapter[_Envelope[Body]]):
        self._adapter = adapter

    def encode(self, body: Body) -> str:
        return self._adapter.dump_json(_Envelope(1, body)).decode()

    def decode(self, text: str) -> Body:
        """Reads a record from its text. Raises MalformedEntry."""
        try:
            return self._adapter.validate_json(text).body
        except ValidationError as error:
            raise MalformedEntry(str(error)) from error


LOADS = Codec(TypeAdapter(_Envelope[ReplicaLoad]))
PLANS = Codec(TypeAdapter(_Envelope[ReplicaPlan]))
DECISIONS = Codec(TypeAdapter(_Envelope[DecisionRecord]))
