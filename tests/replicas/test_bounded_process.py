"""Calls in a process of their own: answers come back, and what does not end is ended."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from replicas.bounded_process import BoundedProcess, CallExceeded, CallLimits, CallTimeout, ProcessClosed
from tests.replicas.bounded_targets import stack_bytes

TARGET = "tests.replicas.bounded_targets:misbehaving"
LIMITS = CallLimits(cpu_s=0.3, memory_bytes=64 * 2**20, wall_s=20.0)


@pytest.fixture
def process() -> Iterator[BoundedProcess]:
    process = BoundedProcess(TARGET, "setup", LIMITS)
    yield process
    process.close()


def pid_of(answer: str) -> int:
    return int(answer.split()[-1])


def test_calls_are_answered_by_one_other_process(process: BoundedProcess) -> None:
    first, second = process.call("a"), process.call("b")
    assert first.startswith("setup a ")
    assert second.startswith("setup b ")
    assert pid_of(first) == pid_of(second) != os.getpid()


def test_what_a_call_raises_is_raised_and_the_process_goes_on(process: BoundedProcess) -> None:
    pid = pid_of(process.call("a"))
    with pytest.raises(KeyError, match="raises"):
        process.call("raises")
    assert pid_of(process.call("a")) == pid


@pytest.mark.parametrize(
    ("told", "status"),
    [("never comes back", -signal.SIGPROF), ("eats memory", 1), ("dies", -signal.SIGABRT)],
)
def test_a_call_past_its_limits_ends_with_its_process_and_the_next_has_another(
    process: BoundedProcess, told: str, status: int
) -> None:
    pid = pid_of(process.call("a"))
    with pytest.raises(CallExceeded, match=f"status {status}"):
        process.call(told)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert pid_of(process.call("a")) != pid


def test_a_call_has_half_the_stack_of_a_thread_here(process: BoundedProcess) -> None:
    """So what goes too deep for this process has ended the other one before."""
    with ThreadPoolExecutor(1) as threads:
        here = threads.submit(stack_bytes).result()
    assert 0 < int(process.call("stack")) <= here // 2


def test_a_call_that_takes_no_time_of_the_processor_is_given_up_after_wall_s() -> None:
    process = BoundedProcess(TARGET, "setup", CallLimits(wall_s=0.5))
    pid = pid_of(process.call("a"))
    with pytest.raises(CallTimeout):
        process.call("sleeps")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    process.close()


def test_a_process_that_is_killed_from_outside_says_nothing_of_the_call(process: BoundedProcess) -> None:
    pid = pid_of(process.call("a"))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CallTimeout):
        process.call("a")
    assert pid_of(process.call("a")) != pid


def test_limits_are_those_of_one_call_and_not_of_all_together(process: BoundedProcess) -> None:
    pid = pid_of(process.call("a"))
    for _ in range(12):
        assert pid_of(process.call("x" * 8_000_000)) == pid


def test_a_setup_that_fails_is_told_at_the_call() -> None:
    process = BoundedProcess(TARGET, "fails to start", LIMITS)
    with pytest.raises(ValueError, match="no setup"):
        process.call("a")
    process.close()


def test_close_ends_a_call_under_way_at_once_and_takes_no_more() -> None:
    process = BoundedProcess(TARGET, "setup", CallLimits(wall_s=600.0))
    pid = pid_of(process.call("a"))
    caught: list[BaseException] = []

    def call() -> None:
        try:
            process.call("sleeps")
        except ProcessClosed as closed:
            caught.append(closed)

    thread = threading.Thread(target=call)
    thread.start()
    process.close()
    thread.join(timeout=20)
    assert len(caught) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ProcessClosed):
        process.call("a")


PARENT = f"""
import sys, time
from replicas.bounded_process import BoundedProcess, CallLimits
process = BoundedProcess({TARGET!r}, "setup", CallLimits())
print(process.call("a").split()[-1], flush=True)
time.sleep(3600)
"""


def test_it_ends_with_a_parent_that_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    descriptor = os.pidfd_open(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline_s = time.monotonic() + 20
    while not _has_ended(descriptor):
        assert time.monotonic() < deadline_s
    os.close(descriptor)


def _has_ended(descriptor: int) -> bool:
    """A process descriptor is readable from the process's end on."""
    return bool(select.select([descriptor], [], [], 0.1)[0])
