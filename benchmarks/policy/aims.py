"""What the rows come to, and which of the aims are met; medians over the turns throughout."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.policy.contenders import AUTO
from benchmarks.policy.rows import Row

LEVEL_AIM = 0.95
MEAN_AIM = 0.97
NEIGHBOUR_AIM = 0.92
WAVE_AIM = 0.95
MEDIAN_ERROR_AIM = 0.15
LARGEST_ERROR_AIM = 0.30
SHIFTS_AIM = 2.0
TRIALS_AIM = 0.02
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Rate:
    """The tokens/s of one contender at one place."""

    median: float
    spread: float
    """From the least turn to the most, as a share of the median."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Rate":
        median = statistics.median(values)
        return cls(median, (max(values) - min(values)) / median if median else 0.0)


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    found: defaultdict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return dict(found)


def rates(rows: Iterable[Row]) -> dict[str, Rate]:
    """By contender; the windows of one turn count as one."""
    found = {}
    for contender, own in grouped(rows, lambda row: row.contender).items():
        turns = grouped(own, lambda row: row.turn).values()
        found[contender] = Rate.of([_rate(turn) for turn in turns])
    return found


def best_fixed(found: Mapping[str, Rate]) -> tuple[str, float] | None:
    """The best of the fixed settings and its tokens/s; None where none was measured."""
    fixed = {name: rate.median for name, rate in found.items() if name != AUTO}
    best = max(fixed, key=lambda name: fixed[name], default=None)
    return None if best is None else (best, fixed[best])


def share_of_best(found: Mapping[str, Rate]) -> float | None:
    """What `auto` makes of the best fixed setting's tokens/s; None where one of both is missing."""
    best = best_fixed(found)
    if best is None or AUTO not in found or not best[1]:
        return None
    return found[AUTO].median / best[1]


def foretold_over_made(rows: Iterable[Row]) -> dict[str, float]:
    """By fixed setting: what was foretold for it while `auto` ran, over what it then made pinned."""
    rows = list(rows)
    made = {name: rate.median for name, rate in rates(rows).items() if name != AUTO}
    foretold: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.contender == AUTO:
            for name, tokens_per_s in row.forecasts.items():
                foretold[name].append(tokens_per_s)
    return {
        name: statistics.median(foretold[name]) / rate
        for name, rate in made.items()
        if rate and foretold.get(name)
    }


@dataclass(frozen=True, slots=True)
class Wave:
    """A ramp or a square wave as a whole: tokens by contender, over the same steps."""

    tokens: Mapping[str, float]
    foreknown: float
    """The tokens of the best fixed setting of each step, known beforehand."""

    @property
    def share(self) -> float:
        """What `auto` makes of `foreknown`."""
        return self.tokens[AUTO] / self.foreknown

    @property
    def room(self) -> float:
        """What following the load could bring at most, as `foreknown` over the best single fixed setting."""
        return self.foreknown / max(tokens for name, tokens in self.tokens.items() if name != AUTO)


def wave(rows: Iterable[Row]) -> Wave | None:
    """None where `auto` or all the fixed settings are missing."""
    rows = list(rows)
    steps = [rates(step) for step in grouped(rows, lambda row: row.label).values()]
    seconds = statistics.median(row.seconds for row in rows)
    contenders = set.intersection(*(set(step) for step in steps))
    if AUTO not in contenders or len(contenders) < 2:
        return None
    tokens = {name: seconds * sum(step[name].median for step in steps) for name in sorted(contenders)}
    fixed = contenders - {AUTO}
    return Wave(tokens, seconds * sum(max(step[name].median for name in fixed) for step in steps))


def shifts_per_minute(rows: Iterable[Row]) -> float:
    """Of the turn with most."""
    return max(60.0 * (row.num_shifts or 0) / row.seconds for row in rows)


def share_of_trials(rows: Iterable[Row]) -> float:
    """The share of the tokens made in modes that no plan seen in the windows has: a trial of another block
    length of a mode that ran is not seen."""
    total = tried = 0
    for row in rows:
        modes = {plan.partition(" ")[0] for plan in row.plans}
        total += sum(row.tokens_by_mode.values())
        tried += sum(num for mode, num in row.tokens_by_mode.items() if mode not in modes)
    return tried / total if total else 0.0


def _rate(rows: Sequence[Row]) -> float:
    return sum(row.tokens for row in rows) / sum(row.seconds for row in rows)
