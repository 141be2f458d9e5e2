"""A contender's clients at a server, and the windows in which they are counted."""

import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.policy import rows
from benchmarks.policy.contenders import FIXED, ignores_eos, prompts
from benchmarks.policy.rows import Row
from benchmarks.policy.state import State, forecasts, num_shifts, read_state, tokens_by_mode
from benchmarks.stream_client import Clients, over_http

MODEL = "triad-5m"


@dataclass(frozen=True, slots=True)
class Place:
    """Which window of a part it is; as in Row."""

    part: str
    contender: str
    clients: int
    turn: int
    at_s: float = 0.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Bench:
    """One server, one workload, and the file that takes the rows."""

    port: int
    workload: str
    max_tokens: int
    raw: Path
    run: dict[str, Any]
    """As Row.run."""

    @asynccontextmanager
    async def clients(self, contender: str) -> AsyncIterator[Clients]:
        """The contender's clients, none at first; at the end all leave after their request."""
        decoding = FIXED.get(contender, {})
        opener = over_http(self.port, MODEL, self.max_tokens, ignores_eos(self.workload), decoding)
        clients = Clients(opener, prompts(self.workload))
        try:
            yield clients
        finally:
            await clients.leave()

    async def window(
        self, clients: Clients, seconds: float, place: Place, num_looks: int = 2, counts_shifts: bool = False
    ) -> Row:
        """Counts for so long, notes the row and returns it.

        num_looks: how often the server's state is read after the window has begun, the last time at its end;
        0 never reads it

        Raises LoadError where the requests of a client fail one after another.
        """
        states: list[State] = []
        if num_looks:
            states.append(await read_state(self.port))
        tally, cpu_s, began_s = clients.tally, time.process_time(), time.monotonic()
        tokens, ended, errors = tally.num_tokens, tally.num_requests, tally.num_errors
        num_ttfts, num_tpots = len(tally.ttfts_s), len(tally.tpots_s)
        for look in range(1, num_looks):
            await clients.hold(began_s + seconds * look / num_looks - time.monotonic())
            states.append(await read_state(self.port))
        await clients.hold(began_s + seconds - time.monotonic())
        tokens, elapsed_s = tally.num_tokens - tokens, time.monotonic() - began_s
        ttfts_s, tpots_s = sorted(tally.ttfts_s[num_ttfts:]), sorted(tally.tpots_s[num_tpots:])
        row = Row(
            place.part,
            place.contender,
            place.clients,
            place.turn,
            round(place.at_s, 3),
            round(elapsed_s, 3),
            tokens,
            round(tokens / elapsed_s, 1),
            _ms(statistics.median(ttfts_s)) if ttfts_s else None,
            _ms(statistics.median(tpots_s)) if tpots_s else None,
            _ms(tpots_s[int(0.95 * (len(tpots_s) - 1))]) if tpots_s else None,
            tally.num_requests - ended,
            tally.num_errors - errors,
            round((time.process_time() - cpu_s) / elapsed_s, 3),
            place.label,
            run=self.run,
            **(await self._seen(states, counts_shifts) if states else {}),
        )
        rows.append(self.raw, row)
        print(
            f"{row.part:<10} {row.label:<9} {row.contender:<20} {row.clients:>3} {row.tokens_per_s:>9,.1f} "
            f"tokens/s{f', {row.num_errors} errors' if row.num_errors else ''}",
            flush=True,
        )
        return row

    async def _seen(self, states: list[State], counts_shifts: bool) -> dict[str, Any]:
        states.append(await read_state(self.port))
        return {
            "plans": list(dict.fromkeys(state.plan for state in states)),
            "forecasts": forecasts(states),
            "tokens_by_mode": tokens_by_mode(states[0], states[-1]),
            "num_shifts": num_shifts(states) if counts_shifts else None,
        }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)
