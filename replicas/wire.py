"""What crosses the socket between an ingress and a replica: frames, each a length and a pickled message.

An ingress opens one connection to each replica. Its first frame is the replica's secret and the id of its
token channel; nothing of a peer that has not sent the secret is unpickled. After it come the ingress's calls,
`submit`, `cancel` and `tokens`, and from the replica the answers and the channel's events, one frame a step.
"""

import pickle
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Literal

from replicas.messages import Delta, Event

SECRET_BYTES = 32
MAX_HELLO_BYTES = SECRET_BYTES + 128
"""The longest first frame."""
MAX_FRAME_BYTES = 2**30
"""The longest frame after it; a prompt is bounded by the ingress long before."""

_LENGTH = struct.Struct(">I")
_EVENTS, _ANSWER = b"E", b"A"
_values_of = attrgetter(*(entry.name for entry in fields(Delta)))

Method = Literal["submit", "cancel", "tokens"]


class FrameError(Exception):
    """The bytes that came are no frames of this protocol."""


class CallError(Exception):
    """A call can't be written as a frame, so no replica can be asked."""


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """The place where a replica listens, and what a peer must know to be heard there."""

    host: str
    port: int
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES), repr=False)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the ingress, which is answered under its number."""

    number: int
    method: Method
    argument: Any


@dataclass(frozen=True, slots=True)
class CallAnswer:
    """The answer to a call."""

    number: int
    value: Any = None
    error: str | None = None
    """The reason why there is no value."""


class FrameBuffer:
    """Cuts a stream of bytes into frames. Raises FrameError for one longer than `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields the frames that are whole with `data`, each without its length."""
        received = self._received
        received += data
        while len(received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received)
            if length > self.max_bytes:
                raise FrameError(f"a frame of {length} bytes; at most {self.max_bytes} are taken")
            end = _LENGTH.size + length
            if len(received) < end:
                return
            frame = bytes(received[_LENGTH.size : end])
            del received[:end]
            yield frame


def hello_frame(secret: bytes, channel_id: str) -> bytes:
    """The first frame of a connection."""
    return _frame(secret + channel_id.encode())


def read_hello(frame: bytes, secret: bytes) -> str | None:
    """Returns the channel's id; None for a peer that does not know the secret."""
    if not secrets.compare_digest(frame[:SECRET_BYTES], secret):
        return None
    try:
        return frame[SECRET_BYTES:].decode() or None
    except UnicodeDecodeError:
        return None


def call_frame(call: Call) -> bytes:
    """Raises CallError."""
    try:
        payload = pickle.dumps((call.number, call.method, call.argument), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises whatever the values' classes do, and RecursionError
        raise CallError(f"a call of {call.method} can't be written: {error!r}") from error
    return _frame(payload)


def read_call(frame: bytes) -> Call:
    """Raises FrameError for one that this version can't read, of whom nobody waits for an answer."""
    try:
        return Call(*pickle.loads(frame))
    except Exception as error:  # pickle raises whatever the classes it names do
        raise FrameError(f"a call can't be read: {error!r}") from error


def answer_frame(answer: CallAnswer) -> bytes:
    values = answer.number, answer.value, answer.error
    return _frame(_ANSWER + pickle.dumps(values, pickle.HIGHEST_PROTOCOL))


def events_frame(events: Sequence[Event]) -> bytes:
    """The frame of one item of a channel. Deltas go as tuples, which pickle thirty times as fast."""
    flat = [_values_of(event) if isinstance(event, Delta) else event for event in events]
    return _frame(_EVENTS + pickle.dumps(flat, pickle.HIGHEST_PROTOCOL))


def read_from_replica(frame: bytes) -> CallAnswer | tuple[Event, ...]:
    """Returns the answer to a call, or the events that came. Raises FrameError for what this version can't
    read."""
    try:
        message = pickle.loads(memoryview(frame)[1:])
        if frame[:1] == _ANSWER:
            return CallAnswer(*message)
        return tuple(Delta(*event) if type(event) is tuple else event for event in message)
    except Exception as error:
        raise FrameError(f"a message can't be read: {error!r}") from error


def _frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload
