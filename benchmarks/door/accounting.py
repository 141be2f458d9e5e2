"""CPU time and memory of a server's processes by kind, and of a process's threads, from /proc."""

import re
from pathlib import Path

from benchmarks.processes import TICKS_PER_S, command_of, descendants

REPLICA, INGRESS, HAPROXY, REDIS, RAY = "replica", "ingress", "HAProxy", "Redis", "Ray"
KINDS = (HAPROXY, INGRESS, REPLICA, REDIS, RAY)
_LEAST_SHARE = 0.2
"""The share of the busiest thread's CPU time from which on a thread took part in forwards."""


def kind_of(command: str) -> str:
    """The kind of a process by its command line; a Serve actor's begins ray::ServeReplica:<app>:<what>."""
    first = command.partition(" ")[0]
    deployment = re.match(r"ray::ServeReplica:[^:]+:(\w+)", first)
    if deployment:
        return {"Ingress": INGRESS, "Replica": REPLICA, "Redis": REDIS}.get(deployment[1], RAY)
    name = first.rpartition("/")[2]
    if name == "haproxy":
        return HAPROXY
    return REDIS if name in ("valkey-server", "redis-server") else RAY


def pids_by_kind(root: int) -> dict[str, list[int]]:
    """The processes from root down; those that have ended meanwhile are left out."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for pid in descendants(root):
        command = command_of(pid)
        if command:
            found[kind_of(command)].append(pid)
    return found


def pss_by_kind(root: int) -> dict[str, int]:
    """Bytes of memory, what several processes share divided among them."""
    return {kind: sum(map(_pss, pids)) for kind, pids in pids_by_kind(root).items()}


def cpu_by_kind(root: int) -> dict[str, float]:
    """CPU seconds so far; those of processes that have ended are gone with them."""
    return {
        kind: sum(seconds for pid in pids for seconds in thread_cpu_s(pid).values())
        for kind, pids in pids_by_kind(root).items()
    }


def thread_cpu_s(pid: int) -> dict[int, float]:
    """CPU seconds so far of each thread by its number, to the kernel's tick; empty for a process gone."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[int(task.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return found


def busiest(before: dict[int, float], after: dict[int, float]) -> frozenset[int]:
    """The threads that took most of the CPU time between two readings of thread_cpu_s: of a replica that did
    little but forwards, the engine's and those that share its forwards."""
    spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
    most = max(spent.values(), default=0.0)
    return frozenset(thread for thread, seconds in spent.items() if most and seconds >= _LEAST_SHARE * most)


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
