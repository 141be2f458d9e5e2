"""Tables in Markdown, plots, and which aims are met, from the raw rows."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.policy import aims, rows
from benchmarks.policy.aims import grouped, rates
from benchmarks.policy.contenders import AUTO
from benchmarks.policy.plots import plot
from benchmarks.policy.rows import Row
from benchmarks.tables import section, table, verdict

STARTS = ((0, 1), (1, 5), (5, 10), (10, 15))
"""The seconds from a server's start that the report joins, from and to."""


def write_report(raw: Path) -> str:
    """Returns the Markdown, which also goes beside the raw rows, with the plots."""
    text = "\n\n".join(_sections(rows.read(raw), raw)) + "\n"
    raw.with_suffix(".md").write_text(text)
    return text


def _sections(found: Sequence[Row], raw: Path) -> Iterator[str]:
    """One section for the rows of each run that may be compared: the day apart, the same machine, code and
    options."""

    def run_of(row: Row) -> str:
        return json.dumps({name: value for name, value in row.run.items() if name != "date"}, sort_keys=True)

    for number, own in enumerate(grouped(found, run_of).values()):
        yield f"## {_title(own)}"
        for part, of_part in grouped(own, lambda row: row.part).items():
            yield f"### {part}"
            yield TABLES[part](of_part)
            if part in ("levels", "ramp", "square"):
                name = f"{raw.stem}-{number}-{part}.png"
                plot(part, of_part, raw.parent / name)
                yield f"![{part}]({name})"


def _title(own: Sequence[Row]) -> str:
    run = own[0].run
    days = sorted({row.run["date"] for row in own})
    avx512 = "with AVX-512" if run["avx512"] else "without AVX-512"
    given = "".join(f", {entry}" for entry in run["triad"])
    between = " to ".join(dict.fromkeys((days[0], days[-1])))
    client = max(row.client_cores for row in own)
    return (
        f"{run['processor']}, {run['cores']:g} cores {avx512}, commit {run['commit']}, "
        f"{between}: {run['policy']}, quality {run['quality']}{given}, "
        f"{run['workload']} prompts, at most {run['max_tokens']} tokens; the client took up to {client:.2f} "
        "of a core"
    )


def least_share(shares: dict[int, float], wanted: float, when: str = "") -> str:
    """The verdict on a share that is wanted at each level."""
    level = min(shares, key=lambda one: shares[one])
    num_met = sum(share >= wanted for share in shares.values())
    found = f"at {num_met} of {len(shares)}, the least {shares[level]:.2f} at {level}"
    what = f"auto / best at least {wanted:g} at each level{f' {when}' if when else ''}"
    return verdict(f"{what}: {found}", num_met == len(shares))


def _levels(found: Sequence[Row]) -> str:
    names = _names(found)
    lines, shares = [], {}
    for level, of_level in _rates_by_level(found).items():
        share, best = aims.share_of_best(of_level), aims.best_fixed(of_level)
        cells = []
        for name in names:
            rate = of_level.get(name)
            cell = "" if rate is None else f"{rate.median:,.0f} ±{rate.spread / 2:.0%}"
            cells.append(f"**{cell}**" if best is not None and name == best[0] else cell)
        lines.append([str(level), *cells, _two(share)])
        if share is not None:
            shares[level] = share
    verdicts = []
    if shares:
        mean = sum(shares.values()) / len(shares)
        on_mean = verdict(f"{aims.MEAN_AIM:g} on average: {mean:.3f}", mean >= aims.MEAN_AIM)
        verdicts = [least_share(shares, aims.LEVEL_AIM), on_mean]
    text = table(["clients: tokens/s", *names, "auto / best"], lines)
    return "\n\n".join((section(text, *verdicts), _forecasts(found)))


def _forecasts(found: Sequence[Row]) -> str:
    names = [name for name in _names(found) if name != AUTO]
    lines, medians, largest = [], [], []
    for level, own in _by_level(found).items():
        ratios = aims.foretold_over_made(own)
        errors = [abs(ratio - 1.0) for ratio in ratios.values()]
        if errors:
            medians.append(statistics.median(errors))
            largest.append(max(errors))
            cells = [_two(ratios.get(name)) for name in names]
            lines.append([str(level), *cells, f"{medians[-1]:.0%}", f"{largest[-1]:.0%}"])
    if not lines:
        return "No forecasts beside what was made."
    on_median = (
        f"the median error at most {aims.MEDIAN_ERROR_AIM:.0%} at each level: up to {max(medians):.0%}"
    )
    on_each = f"every error at most {aims.LARGEST_ERROR_AIM:.0%}: up to {max(largest):.0%}"
    return section(
        table(["clients: foretold / made", *names, "median error", "largest"], lines),
        verdict(on_median, max(medians) <= aims.MEDIAN_ERROR_AIM),
        verdict(on_each, max(largest) <= aims.LARGEST_ERROR_AIM),
    )


def _neighbour(found: Sequence[Row]) -> str:
    windows = (
        ("cycle", "a cycle with a busy neighbour", aims.NEIGHBOUR_AIM),
        ("after", "from 10 s after it", aims.LEVEL_AIM),
    )
    pieces = []
    for label, what, wanted in windows:
        by_level = _rates_by_level([row for row in found if row.label == label])
        names = _names(found)
        lines, shares = [], {}
        for level, of_level in by_level.items():
            share = aims.share_of_best(of_level)
            cells = [f"{of_level[name].median:,.0f}" if name in of_level else "" for name in names]
            lines.append([str(level), *cells, _two(share)])
            if share is not None:
                shares[level] = share
        verdicts = [least_share(shares, wanted)] if shares else []
        pieces.append(section(table([f"clients: tokens/s, {what}", *names, "auto / best"], lines), *verdicts))
    return "\n\n".join(pieces)


def _wave(found: Sequence[Row]) -> str:
    wave = aims.wave(found)
    if wave is None:
        return "Not measured for `auto` and a fixed setting both."
    auto = wave.tokens[AUTO]
    single = max(tokens for name, tokens in wave.tokens.items() if name != AUTO)
    lines = [[name, f"{tokens:,.0f}", _two(auto / tokens)] for name, tokens in wave.tokens.items()]
    lines.append(["the best of each step, known beforehand", f"{wave.foreknown:,.0f}", _two(wave.share)])
    on_steps = f"at least {aims.WAVE_AIM:g} of the best of each step: {wave.share:.2f}"
    on_single = f"at least {aims.WAVE_AIM:g} of each fixed setting: {auto / single:.2f} of the best one"
    return section(
        table(["", "tokens", "auto's over these"], lines),
        verdict(on_steps, wave.share >= aims.WAVE_AIM),
        verdict(f"{on_single}, above which is room for {wave.room:.2f}", auto >= aims.WAVE_AIM * single),
    )


def _steady(found: Sequence[Row]) -> str:
    by_level = _by_level(found)
    shifts = {level: aims.shifts_per_minute(own) for level, own in by_level.items()}
    trials = {level: aims.share_of_trials(own) for level, own in by_level.items()}
    lines = [
        [
            str(level),
            f"{shifts[level]:.1f}",
            f"{trials[level]:.1%}",
            ", ".join(dict.fromkeys(plan for row in own for plan in row.plans)),
        ]
        for level, own in by_level.items()
    ]
    most_shifts, most_trials = max(shifts.values()), max(trials.values())
    on_shifts = f"at most {aims.SHIFTS_AIM:g} shifts a minute: up to {most_shifts:.1f}"
    on_trials = f"at most {aims.TRIALS_AIM:.0%} of the tokens by trials: up to {most_trials:.1%}"
    return section(
        table(["clients", "shifts a minute", "tokens in other modes", "plans"], lines),
        verdict(on_shifts, most_shifts <= aims.SHIFTS_AIM),
        verdict(on_trials, most_trials <= aims.TRIALS_AIM),
    )


def _start(found: Sequence[Row]) -> str:
    lines = []
    shares: dict[int, dict[int, float]] = {first: {} for first, _ in STARTS}
    for level, own in _by_level(found).items():
        best = aims.best_fixed(rates(row for row in own if row.contender != AUTO))
        if best is None:
            continue
        for first, end in STARTS:
            labels = {f"second {number}" for number in range(first, end)}
            seen = rates(row for row in own if row.label in labels)
            if AUTO in seen:
                shares[first][level] = seen[AUTO].median / best[1]
        cells = [_two(shares[first].get(level)) for first, _ in STARTS]
        lines.append([str(level), best[0], f"{best[1]:,.0f}", *cells])
    heads = [f"auto / best, s {first} to {end}" for first, end in STARTS]
    aim = aims.LEVEL_AIM
    wanted = (("with known yields, from 1 s on", 1), ("with other yields, from 10 s on", 10))
    verdicts = [least_share(shares[first], aim, what) for what, first in wanted if shares[first]]
    return section(table(["clients", "best fixed", "its tokens/s", *heads], lines), *verdicts)


def _by_level(found: Iterable[Row]) -> dict[int, list[Row]]:
    return dict(sorted(grouped(found, lambda row: row.clients).items()))


def _rates_by_level(found: Iterable[Row]) -> dict[int, dict[str, aims.Rate]]:
    return {level: rates(own) for level, own in _by_level(found).items()}


def _two(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _names(found: Iterable[Row]) -> list[str]:
    names = list(dict.fromkeys(row.contender for row in found))
    return sorted(names, key=lambda name: (name != AUTO, name.split()[0], int([*name.split(), "1"][1])))


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "levels": _levels,
    "neighbour": _neighbour,
    "ramp": _wave,
    "square": _wave,
    "steady": _steady,
    "start": _start,
}
