"""What an engine keeps of its forwards."""

import threading
import time

from replicas.engine.forwards import HostTime


def spend(cpu_s: float) -> None:
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        pass


def test_what_a_thread_takes_between_its_forwards_is_kept():
    host_time = HostTime()

    def steps() -> None:
        spend(0.04)  # before its first forward: not between two
        for _ in range(2):
            with host_time:
                spend(0.05)
            spend(0.02)

    steps()
    assert 0.02 <= host_time.seconds < 0.04
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    assert 0.04 <= host_time.seconds < 0.06
