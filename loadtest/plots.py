"""The report's figures, drawn with matplotlib and without a display."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from loadtest.metrics import Distribution, Summary, mode_shares, tokens_per_forward_over
from loadtest.observe import Observations
from loadtest.records import Record

matplotlib.rcParams |= {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "triad",
}
COLOURS = ("#1f4e9c", "#d1662b", "#2f8f5b", "#8a4fa3", "#b08a1e", "#4a4a4a")
MODE_COLOURS = {"ar": "#d1662b", "self_speculation": "#2f8f5b", "diffusion": "#8a4fa3"}
Panels = Sequence[tuple[str, Callable[[Summary], float | None]]]
Levels = Mapping[str, Sequence[tuple[float, Summary]]]
"""The levels of each setting, with the figures measured there."""


def latency(levels: Levels, unit: str) -> Figure:
    """p50 and p95 of each latency against load, a colour a setting."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    kinds = (
        ("TTFT", "ttft"),
        ("E2E", "e2e"),
        ("time per output token (TPOT)", "tpot"),
        ("gap between chunks", "inter_chunk"),
    )
    for axes, (title, name) in zip(figure.subplots(2, 2).flat, kinds, strict=True):
        for colour, (setting, points) in zip(_colours(levels), levels.items(), strict=True):
            for percentile, style in ((50, "-"), (95, "--")):
                pairs = [(x, _ms(getattr(s, name), percentile)) for x, s in points]
                known = [(x, y) for x, y in pairs if y is not None]
                if known:
                    label = setting if percentile == 50 else None
                    axes.plot(*zip(*known, strict=True), style, color=colour, marker="o", ms=4, label=label)
        _levels_axis(axes, levels, unit)
        _log_ms(axes, title)
    _legend(figure, "solid: p50, dashed: p95")
    return figure


def overview(levels: Levels, unit: str, machine: str) -> Figure:
    """One plot of a run: latency of a whole answer, and throughput, against load."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    latency, total = figure.subplots(1, 2)
    for colour, (setting, points) in zip(_colours(levels), levels.items(), strict=True):
        for percentile, style in ((50, "-"), (95, "--")):
            pairs = [(x, _ms(s.e2e, percentile)) for x, s in points]
            known = [(x, y) for x, y in pairs if y is not None]
            if known:
                label = setting if percentile == 50 else None
                latency.plot(*zip(*known, strict=True), style, color=colour, marker="o", ms=4, label=label)
        tokens = [(x, s.tokens_per_s) for x, s in points]
        total.plot(*zip(*tokens, strict=True), color=colour, marker="o", ms=4)
    for axes in (latency, total):
        _levels_axis(axes, levels, unit)
    _log_ms(latency, "whole answer (E2E): p50, dashed p95")
    total.set(title="output tokens/s, all users", ylim=(0, None))
    if machine:
        figure.suptitle(machine, fontsize=9, color="#555")
    _legend(figure)
    return figure


def throughput(levels: Levels, unit: str) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels: Panels = (
        ("output tokens/s, all users", lambda s: s.tokens_per_s),
        ("output tokens/s, each user", lambda s: s.tokens_per_s_per_user),
        ("requests/s within their SLO (goodput)", lambda s: s.goodput),
    )
    for axes, (title, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for colour, (setting, points) in zip(_colours(levels), levels.items(), strict=True):
            pairs = [(x, value(s)) for x, s in points if value(s) is not None]
            if pairs:
                axes.plot(*zip(*pairs, strict=True), color=colour, marker="o", ms=4, label=setting)
        _levels_axis(axes, levels, unit)
        axes.set(title=title, ylim=(0, None))
    _legend(figure)
    return figure


def comparison(levels: Levels) -> Figure:
    """The settings at the highest level, as bars."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    last = {setting: points[-1][1] for setting, points in levels.items() if points}
    panels: Panels = (
        ("tokens/s", lambda s: s.tokens_per_s),
        ("E2E p95, s", lambda s: s.e2e.p(95)),
        ("tokens a forward", lambda s: s.tokens_per_forward),
        ("right answers, %", lambda s: None if s.correct is None else 100 * s.correct),
    )
    for axes, (title, value) in zip(figure.subplots(1, 4), panels, strict=True):
        values = [value(s) for s in last.values()]
        heights = [v or 0.0 for v in values]
        labels = ["-" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values]
        bars = axes.bar(range(len(last)), heights, color=_colours(levels))
        axes.bar_label(bars, labels, padding=2)
        axes.set(title=title, xticks=range(len(last)), ylim=(0, 1.15 * max([*heights, 1e-9])))
        axes.set_xticklabels([name.replace("_", "_\n").replace(" (", "\n(") for name in last], fontsize=8)
        axes.grid(axis="x", visible=False)
    return figure


def timeline(records: Sequence[Record], observed: Observations, buckets: int = 36) -> Figure:
    """One stage over time: requests in flight, tokens/s, tokens a forward, each mode's share, the shifts."""
    start = min(r.intended_s for r in records)
    end = max(r.end_s or r.intended_s for r in records)
    edges = np.linspace(start, end + 1e-6, buckets + 1)
    x = (edges[:-1] + edges[1:]) / 2 - start
    width = edges[1] - edges[0]
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    load, tokens, forward, share = figure.subplots(4, 1, sharex=True)
    arrived = np.histogram([r.intended_s for r in records], edges)[0] / width
    flying = [sum(r.intended_s <= t < (r.end_s or end) for r in records) for t in edges[:-1] + width / 2]
    load.step(x, arrived, where="mid", color=COLOURS[5], label="arrivals/s")
    load.plot(x, flying, color=COLOURS[0], label="requests in flight")
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    load.legend(**beside)
    load.set(ylim=(0, None), title="load")
    weights = [r.output_tokens or 0 for r in records if r.end_s is not None]
    ended = [r.end_s for r in records if r.end_s is not None]
    tokens.fill_between(
        x, np.histogram(ended, edges, weights=weights)[0] / width, color=COLOURS[0], alpha=0.35
    )
    tokens.set(ylim=(0, None), title="output tokens/s, counted where their request ended")
    made = tokens_per_forward_over(records, list(edges))
    forward.plot(x, made, color=COLOURS[0], marker="o", ms=4)
    forward.set(ylim=(0, None), title="tokens a forward, of the requests that ended")
    shares = mode_shares(records, list(edges))
    if shares:
        below = np.zeros(buckets)
        for mode, values in shares.items():
            # Bars, not areas: where no request ended there is nothing to show, and nothing to interpolate.
            heights = np.nan_to_num(values)
            colour = MODE_COLOURS.get(mode, COLOURS[5])
            share.bar(x, heights, width, bottom=below, color=colour, label=mode)
            below += heights
        share.legend(**beside)
    else:
        share.text(0.5, 0.5, "this server reports no modes", ha="center", transform=share.transAxes)
    for shift in observed.shifts:
        if start <= shift.at_s <= end:
            for axes in (load, tokens, forward, share):
                axes.axvline(shift.at_s - start, color="#222", lw=1, ls=":")
    share.set(
        ylim=(0, 1), xlim=(0, end - start), xlabel="seconds", title="share of tokens by mode; dotted: shifts"
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)


def _ms(distribution: Distribution, percentile: int) -> float | None:
    value = distribution.p(percentile)
    return None if value is None or value <= 0 else 1000 * value


def _colours(levels: Levels) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(levels))]


def _levels_axis(axes: Axes, levels: Levels, unit: str) -> None:
    ticks = sorted({x for points in levels.values() for x, _ in points})
    if ticks and ticks[0] > 0 and len(ticks) > 1:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(unit)


def _log_ms(axes: Axes, title: str) -> None:
    axes.set(title=title, ylabel="ms", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, note: str | None = None) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1, title=note)
