"""Messages from the leader of a split model reach all others whole, in order, whatever their lengths."""

import mmap
import random
import socket
import threading
from contextlib import ExitStack
from datetime import timedelta

import pytest

from replicas.model.step_channel import (
    Place,
    RingReceiver,
    RingSender,
    bound,
    own_place,
    why_not_shared,
)
from tests.replicas.model.ranks import MESSAGES, ranks
from tests.replicas.model.test_parallel import shared_memory

HERE = Place("a", 1, 1000)
pytestmark = pytest.mark.skipif(own_place() is None, reason="the system shares no memory without a name")


def ring(length: int, num_followers: int, stack: ExitStack) -> tuple[RingSender, list[RingReceiver]]:
    """Both ends of a ring, in one process."""
    memory = mmap.mmap(-1, length)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(num_followers)]
    for pair in pairs:
        for end in pair:
            stack.enter_context(end)
    return RingSender(memory, [ours for ours, _ in pairs]), [RingReceiver(memory, own) for _, own in pairs]


@pytest.mark.parametrize("seed", range(8))
def test_any_messages_arrive_in_a_ring_of_any_length(seed: int) -> None:
    rng = random.Random(seed)
    length = rng.choice((4, 16, 100, 4096))
    sent = [rng.randbytes(rng.choice((0, 1, length // 3, length, 5 * length + 1))) for _ in range(60)]
    with ExitStack() as stack:
        sender, receivers = ring(length, 3, stack)
        received: list[list[bytes]] = [[] for _ in receivers]

        def follow(index: int) -> None:
            received[index] += [receivers[index].receive() for _ in sent]

        threads = [threading.Thread(target=follow, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for message in sent:
            sender.send(message)
        for thread in threads:
            thread.join()
    assert received == [sent] * 3


def test_many_short_messages_wait_in_the_ring_for_who_is_late() -> None:
    with ExitStack() as stack:
        sender, (receiver,) = ring(4096, 1, stack)
        for number in range(100):
            sender.send(str(number).encode())
        assert [receiver.receive() for _ in range(100)] == [str(number).encode() for number in range(100)]


def test_an_end_that_is_gone_is_an_error_at_the_other() -> None:
    with ExitStack() as stack:
        sender, (receiver,) = ring(64, 1, stack)
        sender.send(b"last")
        sender._followers[0].close()
        assert receiver.receive() == b"last"
        with pytest.raises(ConnectionError):
            receiver.receive()
    with ExitStack() as stack:
        sender, (receiver,) = ring(64, 1, stack)
        receiver._leader.close()
        with pytest.raises(ConnectionError):
            sender.send(b"x" * 1000)


def send_for_ever(sender: RingSender, message: bytes) -> None:
    for _ in range(100_000):
        sender.send(message)


def test_who_lives_but_takes_nothing_is_told_of() -> None:
    for length, message in ((64, b"x" * 1000), (4096, b"x")):  # the ring is full, and the socket
        with ExitStack() as stack:
            sender, _ = ring(length, 1, stack)
            bound(sender._followers[0], timedelta(milliseconds=1))
            with pytest.raises(TimeoutError, match="does not take its steps"):
                send_for_ever(sender, message)


def test_where_ranks_share_memory() -> None:
    assert why_not_shared([HERE, HERE]) is None
    for place, reason in (
        (None, "shared memory"),
        (HERE._replace(boot_id="b"), "host"),
        (HERE._replace(network=2), "network"),
        (HERE._replace(user=0), "user"),
    ):
        found = why_not_shared([HERE, HERE, place])
        assert found is not None
        assert reason in found


@pytest.mark.parametrize(("name", "size", "way"), [("ring", 3, "RingSender"), ("gloo", 2, "GlooSender")])
def test_processes_get_all_and_notice_a_killed_leader(name: str, size: int, way: str) -> None:
    """By shared memory, and by gloo where one has none; messages longer than what may be under way."""
    before = shared_memory()
    with ranks(name, size) as (leader, *followers):
        assert leader.stdout is not None
        assert leader.stdout.readline() == f"{way}\n"
        for follower in followers:
            assert follower.stdout is not None
            assert follower.stdout.readline().split() == ["True"] * len(MESSAGES)
        leader.kill()
        leader.wait()
        for follower in followers:
            printed, errors = follower.communicate(timeout=60)
            assert printed == "gone\n", errors
    assert shared_memory() <= before
