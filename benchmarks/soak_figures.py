"""What a soak reads of a server before and after, and how much more than before is still as before."""

from dataclasses import dataclass
from typing import Any

from router.limits import MAX_CALLS

KV_CACHE_MIB = 16
"""The pool of pages that a server is to have, so that a replica's growth is not hidden by it."""
NUM_BURST = 60
"""Requests of a burst."""
MEMORY_SHARE, MEMORY_MIB = 0.1, 8.0
"""The growth of anonymous memory that counts as back where it was: allocators keep some, and fragments
of it."""
SLACK = {"files": 3, "threads": 3, "tasks": 2}


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    before: float
    after: float
    allowed: float

    @property
    def is_fine(self) -> bool:
        return self.after <= self.allowed


def allowed(what: str, before: float) -> float:
    """The most that counts as back where the figure was."""
    kind = what.partition(":")[0]
    more = SLACK.get(kind, 0)
    if what in ("files: Ingress 1", "files: valkey-server 1"):
        # A burst of keys with limits opens connections to Redis up to a bound, and they are kept.
        more += MAX_CALLS
    if what in ("files: Ingress 1", "files: bin/haproxy 1"):
        # HAProxy keeps for a while what a burst had it open to the ingress.
        more += NUM_BURST
    if kind == "MiB":
        # Pages of K/V become resident when they are first used.
        pages = KV_CACHE_MIB if what.startswith("MiB: Replica") else 0
        return round(before * (1 + MEMORY_SHARE) + MEMORY_MIB + pages, 1)
    return before + more


def report(found: dict[str, Any]) -> None:
    print(f"{'':36} {'after warm-up':>14} {'at the end':>12} {'at most':>10}")
    for row in found["rows"]:
        mark = "" if row["fine"] else "   <- more than before"
        print(f"{row['what']:36} {row['before']:>14g} {row['after']:>12g} {row['allowed']:>10g}{mark}")
    for title in ("requests", "faults"):
        print(f"{title}: " + ", ".join(f"{number} {what}" for what, number in found[title].items()))
    print(f"cores used: {found['cores_used']}; amiss: {found['num_broken']}")
    for what in found["broken"]:
        print(f"  {what[:400]}")
