"""Holds the simulator against a machine: rates predicted from its step costs, and rates measured on it."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.simulator.cost import StepTable, TableError
from loadtest.simulator.load import Requests
from loadtest.simulator.parts import Hardware
from loadtest.simulator.replica import SimulatedReplica
from loadtest.simulator.yields import Rounds
from policies.cost import prior_yield
from policies.modes import DecodePlan, Mode

MAX_STEP_TOKENS = 512
MAX_PREFILL_TOKENS = 256
"""The engine's defaults, with which the rates were measured."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One plan at one concurrency; rates in tokens a second."""

    plan: DecodePlan
    concurrency: int
    measured: float
    predicted: float
    spread: float
    """(largest - smallest) / median of the turns."""

    @property
    def error(self) -> float:
        """The relative error of the prediction, positive where the simulator is too fast."""
        return self.predicted / self.measured - 1.0


def validate(path: Path) -> list[Cell]:
    """Predicts the rates of a file of `python -m benchmarks.step_cost`. Raises TableError, OSError.

    Taken from the measurement are the step costs, and each request's lengths and number of forwards;
    predicted is the time that all of it takes together, with `concurrency` requests kept running.
    """
    found = json.loads(path.read_text())
    table = StepTable.parse(found, str(path))
    if not found.get("measured"):
        raise TableError(f"{path}: it has no measured rates to hold the simulator against")
    return [_cell(table, row) for row in found["measured"]]


def _cell(table: StepTable, row: dict[str, Any]) -> Cell:
    plan = DecodePlan(Mode(row["mode"]), row["block_length"])
    requests = _requests(row["requests"], plan.block_length)
    concurrency = row["concurrency"]
    hardware = Hardware(table, table.fitted, concurrency, MAX_STEP_TOKENS, MAX_PREFILL_TOKENS)
    yields = {plan: prior_yield(plan)}
    replica = SimulatedReplica("r0", hardware, requests, {plan: Rounds(plan, 2.0)}, plan, yields)
    for request in range(len(requests)):
        replica.submit(request, 0.0)
    num_done, now_s = 0, 0.0
    while num_done < len(requests):
        now_s = replica.next_s
        num_done += len(replica.advance())
    return Cell(
        plan,
        concurrency,
        row["tokens_per_s"],
        sum(requests.output) / now_s,
        (max(row["turns"]) - min(row["turns"])) / statistics.median(row["turns"]),
    )


def _requests(rows: Sequence[Sequence[int]], block_length: int) -> Requests:
    """The requests of a measurement; one from before forwards began the next draft or block too tells no
    rows, since they were a block's."""
    num = len(rows)
    measured = []
    for _, _, _, num_forwards, *num_rows in rows:
        forwards = float(max(1, num_forwards))
        measured.append((forwards, num_rows[0] / forwards if num_rows else float(block_length)))
    return Requests(
        arrival_s=[0.0] * num,
        prompt=[row[0] for row in rows],
        output=[row[2] for row in rows],
        category=[0] * num,
        chance=[0] * num,
        luck=[0.0] * num,
        pinned=[None] * num,
        prefix=[-1] * num,
        prefix_tokens=0,
        max_tokens=200,
        measured=measured,
        reused=[row[0] - row[1] for row in rows],
    )


def lines(cells: Sequence[Cell]) -> Iterator[str]:
    """A Markdown table, and how many cells are within 15 %."""
    concurrencies = sorted({cell.concurrency for cell in cells})
    plans = list(dict.fromkeys(cell.plan for cell in cells))
    by_key = {(cell.plan, cell.concurrency): cell for cell in cells}
    yield "| simulated / measured tokens/s at concurrency | " + " | ".join(map(str, concurrencies)) + " |"
    yield "|" + "---|" * (1 + len(concurrencies))
    for plan in plans:
        name = plan.mode.value if plan.block_length == 1 else f"{plan.mode.value}, block {plan.block_length}"
        entries = []
        for concurrency in concurrencies:
            cell = by_key[plan, concurrency]
            entries.append(f"{cell.predicted:,.0f} / {cell.measured:,.0f} ({cell.error:+.0%})")
        yield f"| {name} | " + " | ".join(entries) + " |"
    errors = [abs(cell.error) for cell in cells]
    spreads = [cell.spread for cell in cells]
    within = sum(error <= 0.15 for error in errors)
    yield ""
    yield (
        f"{within} of {len(cells)} cells within 15 %; mean error {sum(errors) / len(errors):.1%}, largest "
        f"{max(errors):.1%}. Turns of the same measurement differ by "
        f"{statistics.median(spreads):.0%} (median cell) to {max(spreads):.0%}."
    )
