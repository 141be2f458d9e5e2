"""The way of bytes from the leader of a split model to the others, which all receive all of them.

On one host they lie in a ring of shared memory that all ranks have mapped. A socket to each follower says how
much has come; it wakes whoever sleeps, orders the bytes before the word of them on any processor, and its end
tells that a process is gone. The memory has no name (memfd_create) and travels over the same sockets, so
nothing is left behind however its processes end, and a container's /dev/shm may be as small as it likes.
Ranks that are not on one host, or whose system has no such memory, take gloo.
"""

import logging
import mmap
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from struct import Struct
from typing import NamedTuple, Protocol

import torch.distributed as dist

RING_BYTES = 4 << 20
"""What may be under way. A longer message goes in parts, which are read while others are written."""
SPIN_S = 100e-6
"""A follower looks for the next message for so long before it sleeps, as waking up takes tens of µs."""
IDLE_TIMEOUT = timedelta(days=365)
"""Followers wait this long for a message over gloo: a replica may idle. A dead leader's connection closes at
once."""

_PART = Struct("<I?")
"""The length of a part, and whether it is a message's last."""
_READ = Struct("<Q")
"""How many bytes a follower has read in all."""
_TIME = Struct("ll")

logger = logging.getLogger(__name__)


class Sender(Protocol):
    def send(self, message: bytes, /) -> None:
        """Sends a message, of any length, to all followers. Raises what a dead or hanging one brings
        about."""
        ...


class Receiver(Protocol):
    def receive(self) -> bytes:
        """Waits for the next message, for as long as the leader lives; raises when it does not."""
        ...


class RingSender:
    """The leader's side of a ring. followers: sockets to them, all of which have mapped the memory."""

    def __init__(self, memory: mmap.mmap, followers: Sequence[socket.socket]):
        self._memory = memory
        self._followers = followers
        self._read = [0] * len(followers)  # as far as they have told
        self._written = 0

    def send(self, message: bytes) -> None:
        left = memoryview(message)
        while True:
            part = left[: len(self._memory) // 2]
            left = left[len(part) :]
            self._wait_for_room(len(part))
            self._write(part)
            word = _PART.pack(len(part), not left)
            with _hanging_told():
                for follower in self._followers:
                    follower.send(word, socket.MSG_NOSIGNAL)
            if not left:
                return

    def _wait_for_room(self, count: int) -> None:
        """Waits until all have read what so many bytes more would overwrite."""
        for index, follower in enumerate(self._followers):
            while self._written + count - self._read[index] > len(self._memory):
                with _hanging_told():
                    (self._read[index],) = _READ.unpack(_received(follower, _READ.size))

    def _write(self, part: memoryview) -> None:
        at = self._written % len(self._memory)
        first = part[: len(self._memory) - at]
        self._memory[at : at + len(first)] = bytes(first)
        self._memory[: len(part) - len(first)] = bytes(part[len(first) :])
        self._written += len(part)


class RingReceiver:
    """A follower's side of a ring."""

    def __init__(self, memory: mmap.mmap, leader: socket.socket):
        self._memory = memory
        self._leader = leader
        self._read = self._told = 0

    def receive(self) -> bytes:
        parts = []
        is_last = False
        while not is_last:
            length, is_last = _PART.unpack(_awaited(self._leader, _PART.size))
            at = self._read % len(self._memory)
            parts.append(self._memory[at : at + length])
            parts.append(self._memory[: length - len(parts[-1])])
            self._read += length
            # The leader waits for room for half a ring at most, so it is enough to tell of each quarter.
            if self._read - self._told >= len(self._memory) // 4:
                self._told = self._read
                self._leader.send(_READ.pack(self._read), socket.MSG_NOSIGNAL)
        return b"".join(parts)


@contextmanager
def _hanging_told() -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:  # as the kernel tells of a timeout
        raise TimeoutError("a process lives but does not take its steps") from error


def _awaited(sock: socket.socket, size: int) -> bytes:
    """The next record of a socket, looked for before it is slept for."""
    until = time.perf_counter() + SPIN_S
    while time.perf_counter() < until:
        with suppress(BlockingIOError):
            return _received(sock, size, socket.MSG_DONTWAIT)
        os.sched_yield()
    return _received(sock, size)


def _received(sock: socket.socket, size: int, flags: int = 0) -> bytes:
    record = sock.recv(size, flags)
    if not record:
        raise ConnectionError("the process at the other end is gone")
    return record


class GlooSender:
    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def send(self, message: bytes) -> None:
        dist.broadcast_object_list([message], src=0, group=self._group)


class GlooReceiver:
    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def receive(self) -> bytes:
        received: list[bytes] = [b""]
        dist.broadcast_object_list(received, src=0, group=self._group)
        return received[0]


class Place(NamedTuple):
    """Where a rank is: what has to be the same for sockets and memory to be shared."""

    boot_id: str
    """The running system's own."""
    network: int
    """The network namespace, in which unnamed sockets of the system are found."""
    user: int


_APART = {
    "boot_id": "they are not on one host",
    "network": "they are in network namespaces of their own",
    "user": "they run as different users",
}


def own_place() -> Place | None:
    """Where this process is; None where the system shares no memory without a name."""
    if sys.platform != "linux":
        return None
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Place(boot_id, Path("/proc/self/ns/net").stat().st_ino, os.geteuid())
    except OSError:
        return None


def why_not_shared(places: Sequence[Place | None]) -> str | None:
    """Why ranks at these places can share no memory; None where they can."""
    if None in places:
        return "the system has no shared memory without a name"
    for field, reason in _APART.items():
        if len({getattr(place, field) for place in places}) > 1:
            return reason
    return None


def open_sender(timeout: timedelta, place: Place | None) -> Sender:
    """The leader's side; returns when all ranks have called `open_receiver`.

    timeout: how long it waits for a follower that lives but does not come
    place: this process's, as of own_place
    """
    with ExitStack() as stack:
        address = b""
        if place is not None:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(b"")  # a name that the system makes up, and that ends with the socket
            listener.listen(dist.get_world_size())
            address = listener.getsockname()
        why_not, _ = _agree(place, address)
        if why_not is not None:
            logger.warning("the steps of the model's ranks go by gloo: %s", why_not)
            return GlooSender(_gloo_group())
        memory = os.memfd_create("steps")
        try:
            os.ftruncate(memory, RING_BYTES)
            followers = [_accepted(listener, memory, timeout) for _ in range(1, dist.get_world_size())]
            return RingSender(mmap.mmap(memory, RING_BYTES), followers)
        finally:
            os.close(memory)


def open_receiver(place: Place | None) -> Receiver:
    """A follower's side. place: this process's, as of own_place."""
    why_not, address = _agree(place, b"")
    if why_not is not None:
        return GlooReceiver(_gloo_group())
    leader = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    leader.connect(address)
    record, (memory,), *_ = socket.recv_fds(leader, _READ.size, 1)
    try:
        (length,) = _READ.unpack(record)
        return RingReceiver(mmap.mmap(memory, length, prot=mmap.PROT_READ), leader)
    finally:
        os.close(memory)


def _agree(place: Place | None, address: bytes) -> tuple[str | None, bytes]:
    """Tells all ranks of this one's place and the leader's address -> why_not_shared, and that address."""
    told: list[tuple[Place | None, bytes]] = [(None, b"")] * dist.get_world_size()
    dist.all_gather_object(told, (place, address))
    return why_not_shared([each for each, _ in told]), told[0][1]


def _accepted(listener: socket.socket, memory: int, timeout: timedelta) -> socket.socket:
    """The next follower's socket; it is sent the memory's descriptor."""
    listener.settimeout(timeout.total_seconds())
    follower, _ = listener.accept()
    follower.setblocking(True)
    bound(follower, timeout)
    socket.send_fds(follower, [_READ.pack(RING_BYTES)], [memory])
    return follower


def bound(sock: socket.socket, timeout: timedelta) -> None:
    """Bounds a blocking socket's waits in the kernel: Python's own timeouts cost a call to poll each time."""
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        seconds, microseconds = divmod(timeout // timedelta(microseconds=1), 1_000_000)
        sock.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(seconds, microseconds))


def _gloo_group() -> dist.ProcessGroup:
    """A group for messages; made by all of the processes at once."""
    group = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group
