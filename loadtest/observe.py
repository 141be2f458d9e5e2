"""Watches a Triad while it is loaded: its plans, its shifts, and what runs in which mode."""

import asyncio
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from loadtest.client import Client

PERIOD_S = 0.5


@dataclass(frozen=True)
class Shift:
    """A change of plan, from the controller's log."""

    at_s: float
    """Seconds since the epoch by the store's clock."""
    replica: str
    mode: str
    reason: str


@dataclass
class Observations:
    """The observations of one run."""

    shifts: list[Shift] = field(default_factory=list)
    running: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    """Seconds since the epoch, and the requests running by mode over all replicas."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Observations":
        running = [(at_s, modes) for at_s, modes in row["running"]]
        return cls([Shift(**shift) for shift in row["shifts"]], running)

    def take(self, state: dict[str, Any], at_s: float) -> None:
        """Takes in one answer of GET /v1/triad/state; decisions seen before are not taken again."""
        total: dict[str, int] = {}
        for replica in state["replicas"]:
            for mode, num in replica["load"]["running_by_mode"].items():
                total[mode] = total.get(mode, 0) + num
        self.running.append((at_s, total))
        known = set(self.shifts)
        for decision in state["decisions"] or ():
            if decision["changed"]:
                plan = decision["plan"]
                shift = Shift(
                    decision["at_s"],
                    decision["load"]["replica_id"],
                    plan["decode"]["mode"],
                    plan["reason"],
                )
                if shift not in known:
                    self.shifts.append(shift)
        self.shifts.sort(key=lambda shift: shift.at_s)


async def observe(
    client: Client, url: str, api_key: str | None, into: Observations, period_s: float = PERIOD_S
) -> None:
    """Observes a server until cancelled.

    One that is busy, without this path, or for whose state the key is no good, is simply not observed.
    """
    while True:
        try:
            into.take(await client.get(f"{url}/v1/triad/state", api_key), client.now_s())
        except aiohttp.ClientResponseError as error:
            if error.status in (401, 403, 404):
                return
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
            pass
        await asyncio.sleep(period_s)
