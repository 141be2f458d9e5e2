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
from benchmarks.tables import table, verdict

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


def least_share(shares: dict[int, float], wanted: float) -> str:
    """The verdict on a share that is wanted at each level."""
    level = min(shares, key=lambda one: shares[one])
    num_met = sum(share >= wanted for share in shares.values())
    return verdict(
        f"auto / best at least {wanted:g} at each level: at {num_met} of {len(shares)}, the least "
        f"{shares[level]:.2f} at {level}",
        num_met == len(shares),
    )


def _levels(found: Sequence[Row]) -> str:
    by_level = {level: rates(own) for level, own in sorted(grouped(found, lambda row: row.clients).items())}
    names = _names(found)
    lines, shares = [], {}
    for level, of_level in by_level.items():
        share, best = aims.share_of_best(of_level), aims.best_fixed(of_level)
        cells = []
        for name in names:
            rate = of_level.get(name)
            cell = "" if rate is None else f"{rate.median:,.0f} ±{rate.spread / 2:.0%}"
            cells.append(f"**{cell}**" if best is not None and name == best[0] else cell)
        lines.append([str(level), *cells, "" if share is None else f"{share:.2f}"])
        if share is not None:
            shares[level] = share
    pieces = [table(["clients: tokens/s", *names, "auto / best"], lines)]
    if shares:
        mean = sum(shares.values()) / len(shares)
        on_mean = verdict(f"{aims.MEAN_AIM:g} on average: {mean:.3f}", mean >= aims.MEAN_AIM)
        pieces.append("\n".join((least_share(shares, aims.LEVEL_AIM), on_mean)))
    return "\n\n".join([*pieces, _forecasts(found)])


def _forecasts(found: Sequence[Row]) -> str:
    by_level = {
        level: aims.foretold_over_made(own)
        for level, own in sorted(grouped(found, lambda row: row.clients).items())
    }
    names = [name for name in _names(found) if name != AUTO]
    lines = []
    medians, largest = [], []
    for level, ratios in by_level.items():
        errors = sorted(abs(ratio - 1.0) for ratio in ratios.values())
        if not errors:
            continue
        medians.append(statistics.median(errors))
        largest.append(errors[-1])
        cells = [f"{ratios[name]:.2f}" if name in ratios else "" for name in names]
        lines.append([str(level), *cells, f"{medians[-1]:.0%}", f"{largest[-1]:.0%}"])
    if not lines:
        return "No forecasts beside what was made."
    return "\n\n".join(
        (
            table(["clients: foretold / made", *names, "median error", "largest"], lines),
            "\n".join(
                (
                    verdict(
                        f"the median error at most {aims.MEDIAN_ERROR_AIM:.0%} at each level: up to "
                        f"{max(medians):.0%}",
                        max(medians) <= aims.MEDIAN_ERROR_AIM,
                    ),
                    verdict(
                        f"every error at most {aims.LARGEST_ERROR_AIM:.0%}: up to {max(largest):.0%}",
                        max(largest) <= aims.LARGEST_ERROR_AIM,
                    ),
                )
            ),
        )
    )


def _neighbour(found: Sequence[Row]) -> str:
    pieces = []
    for label, wanted in (("cycle", aims.NEIGHBOUR_AIM), ("after", aims.LEVEL_AIM)):
        own = [row for row in found if row.label == label]
        by_level = {
            level: rates(some) for level, some in sorted(grouped(own, lambda row: row.clients).items())
        }
        shares = {
            level: share
            for level, of_level in by_level.items()
            if (share := aims.share_of_best(of_level)) is not None
        }
        names = _names(own)
        lines = []
        for level, of_level in by_level.items():
            cells = [f"{of_level[name].median:,.0f}" if name in of_level else "" for name in names]
            lines.append([str(level), *cells, f"{shares[level]:.2f}" if level in shares else ""])
        what = "a cycle with a busy neighbour" if label == "cycle" else "from 10 s after it"
        pieces.append(table([f"clients: tokens/s, {what}", *names, "auto / best"], lines))
        if shares:
            pieces.append(least_share(shares, wanted))
    return "\n\n".join(pieces)


def _wave(found: Sequence[Row]) -> str:
    wave = aims.wave(found)
    if wave is None:
        return "Not measured for `auto` and a fixed setting both."
    lines = [
        [name, f"{tokens:,.0f}", f"{wave.tokens[AUTO] / tokens:.2f}"] for name, tokens in wave.tokens.items()
    ]
    lines.append(["the best of each step, known beforehand", f"{wave.foreknown:,.0f}", f"{wave.share:.2f}"])
    single = max(tokens for name, tokens in wave.tokens.items() if name != AUTO)
    return "\n\n".join(
        (
            table(["", "tokens", "auto's over these"], lines),
            "\n".join(
                (
                    verdict(
                        f"at least {aims.WAVE_AIM:g} of the best of each step: {wave.share:.2f}",
                        wave.share >= aims.WAVE_AIM,
                    ),
                    verdict(
                        f"at least {aims.WAVE_AIM:g} of any single fixed setting: "
                        f"{wave.tokens[AUTO] / single:.2f} of the best, where the room above it is "
                        f"{wave.room:.2f}",
                        wave.tokens[AUTO] >= aims.WAVE_AIM * single,
                    ),
                )
            ),
        )
    )


def _steady(found: Sequence[Row]) -> str:
    by_level = sorted(grouped(found, lambda row: row.clients).items())
    shifts = {level: aims.shifts_per_minute(own) for level, own in by_level}
    trials = {level: aims.share_of_trials(own) for level, own in by_level}
    plans = {
        level: ", ".join(dict.fromkeys(plan for row in own for plan in row.plans)) for level, own in by_level
    }
    lines = [
        [str(level), f"{shifts[level]:.1f}", f"{trials[level]:.1%}", plans[level]] for level, _ in by_level
    ]
    return "\n\n".join(
        (
            table(["clients", "shifts a minute", "tokens in other modes", "plans"], lines),
            "\n".join(
                (
                    verdict(
                        f"at most {aims.SHIFTS_AIM:g} shifts a minute: up to {max(shifts.values()):.1f}",
                        max(shifts.values()) <= aims.SHIFTS_AIM,
                    ),
                    verdict(
                        f"at most {aims.TRIALS_AIM:.0%} by trials: up to {max(trials.values()):.1%}",
                        max(trials.values()) <= aims.TRIALS_AIM,
                    ),
                )
            ),
        )
    )


def _start(found: Sequence[Row]) -> str:
    lines, from_first, from_tenth = [], {}, {}
    for level, own in sorted(grouped(found, lambda row: row.clients).items()):
        best = aims.best_fixed(rates(row for row in own if row.contender != AUTO))
        if best is None:
            continue
        cells = []
        for first, end in STARTS:
            labels = {f"second {number}" for number in range(first, end)}
            seen = rates(row for row in own if row.label in labels)
            share = seen[AUTO].median / best[1] if AUTO in seen else None
            cells.append("" if share is None else f"{share:.2f}")
            if share is not None and first == 1:
                from_first[level] = share
            if share is not None and first == 10:
                from_tenth[level] = share
        lines.append([str(level), best[0], f"{best[1]:,.0f}", *cells])
    heads = [f"s {first} to {end}" for first, end in STARTS]
    pieces = [
        table(["clients", "best fixed", "its tokens/s", *(f"auto / best, {head}" for head in heads)], lines)
    ]
    for what, shares in (
        ("known yields, from 1 s on", from_first),
        ("other yields, from 10 s on", from_tenth),
    ):
        if shares:
            pieces.append(f"{what}:\n\n{least_share(shares, aims.LEVEL_AIM)}")
    return "\n\n".join(pieces)


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
