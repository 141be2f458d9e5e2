"""One report for every kind of load: HTML with its plots inside, PNGs, JSON and a summary table.

`python -m loadtest.report FOLDER_OR_JSONL... --out FOLDER` makes it from records, locust's too.
"""

import argparse
import base64
import html
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from loadtest import plots
from loadtest.gates import Gate, parse_gates
from loadtest.metrics import PERCENTILES, Distribution, Summary, summarise
from loadtest.observe import Observations
from loadtest.overview import markdown, overview
from loadtest.records import Record, read_records
from loadtest.slo import Slo, parse_slos
from loadtest.workloads import WORKLOADS


@dataclass
class RunInfo:
    title: str
    command: str
    machine: str
    model: str = ""
    duration_s: float = 0.0
    slos: dict[str, Slo] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    observations: Observations = field(default_factory=Observations)


@dataclass(frozen=True)
class Row:
    """One setting at one stage, or one class of its requests."""

    setting: str
    stage: str
    level: float | None
    summary: Summary


def rows_of(records: Sequence[Record], slos: Mapping[str, Slo]) -> list[Row]:
    """A row for each stage and setting, in the order in which they were first seen."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.stage, record.setting), []).append(record)
    return [
        Row(setting, stage, group[0].level, summarise(group, slos))
        for (stage, setting), group in groups.items()
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _ms(distribution: Distribution, percentile: int) -> str:
    value = distribution.p(percentile)
    return "-" if value is None else f"{1000 * value:.1f}" if value < 0.1 else f"{1000 * value:.0f}"


def _percentile(name: str, percentile: int) -> Callable[[Row], str]:
    return lambda row: _ms(getattr(row.summary, name), percentile)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "setting": lambda r: r.setting,
    "load": lambda r: r.stage,
    "requests": lambda r: str(r.summary.num_requests),
    "good": lambda r: str(r.summary.num_good),
    "errors": lambda r: ", ".join(f"{kind} x{num}" for kind, num in r.summary.errors.items()) or "0",
    "req/s": lambda r: f"{r.summary.requests_per_s:.2f}",
    "tok/s": lambda r: f"{r.summary.tokens_per_s:.0f}",
    "tok/s/user": lambda r: _number(r.summary.tokens_per_s_per_user, "{:.0f}"),
    **{
        f"{title} p{percentile}": _percentile(name, percentile)
        for title, name in (
            ("TTFT", "ttft"),
            ("TTST", "ttst"),
            ("TPOT", "tpot"),
            ("chunk gap", "inter_chunk"),
            ("E2E", "e2e"),
        )
        for percentile in PERCENTILES
    },
    "goodput": lambda r: f"{r.summary.goodput:.2f}",
    "SLO %": lambda r: f"{100 * r.summary.attained:.0f}",
    "right %": lambda r: _number(None if r.summary.correct is None else 100 * r.summary.correct, "{:.1f}"),
    "tok/forward": lambda r: _number(r.summary.tokens_per_forward, "{:.2f}"),
    "switches": lambda r: str(r.summary.num_switches),
    "client late p99": lambda r: _number(
        None if r.summary.late_p99_s is None else 1000 * r.summary.late_p99_s, "{:.1f}"
    ),
}
"""The columns of the full table; times in ms."""

SHORT = (
    *("setting", "load", "good", "errors", "tok/s", "TTFT p50", "TTFT p95", "TPOT p50", "chunk gap p95"),
    *("E2E p50", "E2E p95", "SLO %", "right %", "tok/forward"),
)
"""The columns of the summary table."""


def cells(row: Row, columns: Iterable[str] = COLUMNS) -> list[str]:
    return [COLUMNS[name](row) for name in columns]


def text_table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *body, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in (columns, *body)
    ]
    return "\n".join(lines)


def write_report(info: RunInfo, out: Path, gates: Sequence[Gate], gate_up_to: float | None) -> list[str]:
    """Writes report.html, summary.txt, .md and .json, overview.md and the PNGs; returns the broken gates.

    Raises ValueError without records.
    """
    if not info.records:
        raise ValueError("there are no records to report on")
    out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(info.records, info.slos)
    broken = [
        f"{row.setting} at {row.stage}: {problem}"
        for row in rows
        if gate_up_to is None or (row.level is not None and row.level <= gate_up_to)
        for gate in gates
        if (problem := gate.broken_by(row.summary)) is not None
    ]
    body = [cells(row, SHORT) for row in rows]
    (out / "summary.txt").write_text(text_table(SHORT, body) + "\n\nTimes in ms, from the intended send.\n")
    (out / "summary.md").write_text(markdown([SHORT, *body]))
    (out / "overview.md").write_text(markdown(overview(info.records, info.slos)))
    (out / "summary.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    figures = _figures(info, rows)
    for name, (_, figure) in figures.items():
        plots.save(figure, out / f"{name}.png")
    (out / "report.html").write_text(_html(info, rows, figures, out, gates, broken))
    return broken


def _figures(info: RunInfo, rows: Sequence[Row]) -> dict[str, tuple[str, Figure]]:
    found: dict[str, tuple[str, Figure]] = {}
    for suffix, unit in (("/s", "requests/s offered"), (" users", "users")):
        levels: dict[str, list[tuple[float, Summary]]] = {}
        for row in rows:
            if row.level is not None and row.stage.endswith(suffix):
                levels.setdefault(row.setting, []).append((row.level, row.summary))
        if levels:
            kind = "rate" if suffix == "/s" else "users"
            if "overview" not in found:
                found["overview"] = ("At a glance", plots.overview(levels, unit, info.machine))
            found[f"latency-{kind}"] = ("Latency against load", plots.latency(levels, unit))
            found[f"throughput-{kind}"] = ("Throughput and goodput", plots.throughput(levels, unit))
            highest = max(level for points in levels.values() for level, _ in points)
            title = f"The settings side by side at {highest:g} {unit}"
            found[f"comparison-{kind}"] = (title, plots.comparison(levels))
    varying = dict.fromkeys((r.stage, r.setting) for r in info.records if r.level is None)
    for number, (stage, setting) in enumerate(varying):
        its = [r for r in info.records if (r.stage, r.setting) == (stage, setting)]
        name = "timeline" if number == 0 else f"timeline-{number + 1}"
        found[name] = (f"Over time: {setting}, {stage}", plots.timeline(its, info.observations))
    return found


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c1c1c;max-width:1180px;margin:2rem auto;padding:0 1.2rem}
h1{margin:0 0 .2rem;font-size:1.7rem}h2{margin:2.2rem 0 .5rem;font-size:1.2rem}.about{color:#555;margin:0}
code{background:#f3f3f1;padding:.1em .3em;border-radius:3px}img{width:100%}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:12.5px;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e4e4e0}
th{border-bottom:2px solid #888;font-weight:600}td:first-child,th:first-child{text-align:left}
.first td{border-top:2px solid #c9c9c4}.verdict{display:inline-block;margin:1rem 0;padding:.4rem .8rem;
border-radius:5px;background:#e4f3e8;color:#17602f}.broken{background:#fbe6e3;color:#8c1d10}
"""


def _html(
    info: RunInfo,
    rows: Sequence[Row],
    figures: Mapping[str, tuple[str, Figure]],
    out: Path,
    gates: Sequence[Gate],
    broken: Sequence[str],
) -> str:
    escape = html.escape
    wanted = ", ".join(f"{g.figure} {g.sign} {g.bound:g}" for g in gates) or "no gates"
    known = [f"{len(info.records)} requests"]
    if info.model:
        known.insert(0, f"model <b>{escape(info.model)}</b>")
    if info.duration_s:
        known[-1] += f" in {info.duration_s:.0f} s"
    if info.machine:
        known.append(escape(info.machine))
    about = " · ".join(known)
    verdict = "".join(f"<br>{escape(line)}" for line in broken)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(info.title)}</title><style>{_STYLE}</style><h1>{escape(info.title)}</h1>",
        f"<p class=about>{about}<br><code>{escape(info.command)}</code></p>",
        f"<p class='verdict{' broken' if broken else ''}'>{'Gates broken' if broken else 'Gates kept'}: "
        f"{escape(wanted)}{verdict}</p>",
    ]
    for name, (title, _) in figures.items():
        image = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        parts.append(
            f"<h2>{escape(title)}</h2><img alt='{escape(title)}' src='data:image/png;base64,{image}'>"
        )
    parts.append("<h2>All figures</h2>" + _html_table(rows))
    by_class = [
        Row(f"{row.setting}: {name}", row.stage, row.level, summary)
        for row in rows
        for name, summary in _by_class(info, row)
    ]
    if by_class:
        parts.append("<h2>By class, each under its own SLO</h2>" + _html_table(by_class))
    if info.observations.shifts:
        parts.append("<h2>Shifts, by the controller's log</h2>" + _shift_table(info))
    slos = "; ".join(f"{name}: {slo}" for name, slo in info.slos.items())
    parts.append(
        "<p class=about>Times in ms, counted from the intended send. TPOT = (E2E - TTFT) / (tokens - 1). "
        "Blocks of tokens arrive in bursts, so the gap between chunks is another figure than time per token. "
        f"Goodput counts requests within their SLO ({escape(slos) or 'none set'}). Tokens a forward leave "
        "out each request's first token; a round of self-speculation is one forward.</p></html>"
    )
    return "\n".join(parts)


def _by_class(info: RunInfo, row: Row) -> list[tuple[str, Summary]]:
    its = [r for r in info.records if (r.stage, r.setting) == (row.stage, row.setting)]
    names = sorted({r.class_name for r in its})
    if len(names) < 2:
        return []
    return [(name, summarise([r for r in its if r.class_name == name], info.slos)) for name in names]


def _html_table(rows: Sequence[Row]) -> str:
    lines = ["<div class=scroll><table><tr>" + "".join(f"<th>{c}</th>" for c in COLUMNS) + "</tr>"]
    before = None
    for row in rows:
        first = " class=first" if before is not None and row.stage != before else ""
        before = row.stage
        lines.append(f"<tr{first}>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(row)) + "</tr>")
    return "".join(lines) + "</table></div>"


def _shift_table(info: RunInfo) -> str:
    """The shifts, each with its stage and the seconds into it; those between stages have none."""
    spans: dict[tuple[str, str, int], tuple[float, float]] = {}
    for r in info.records:
        key = r.setting, r.stage, r.turn
        begin, end = spans.get(key, (math.inf, -math.inf))
        spans[key] = min(begin, r.intended_s), max(end, r.end_s or r.intended_s)
    lines = []
    for shift in info.observations.shifts:
        inside = [(key, begin) for key, (begin, end) in spans.items() if begin <= shift.at_s <= end]
        (setting, stage, _), begin = inside[0] if inside else (("-", "between stages", 0), shift.at_s)
        after = f"{shift.at_s - begin:.1f}" if inside else "-"
        cells = (setting, stage, after, shift.replica, shift.mode, shift.reason)
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = ("setting", "load", "after s", "replica", "to", "reason")
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f"<div class=scroll><table><tr>{titles}</tr>{''.join(lines)}</table></div>"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.report", description=__doc__)
    parser.add_argument(
        "records", nargs="+", type=Path, help="JSONL of records, or folders with records.jsonl"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="Load test")
    parser.add_argument("--gate", default="")
    parser.add_argument("--slo", nargs="+", default=[], help="as of python -m loadtest")
    o = parser.parse_args(arguments)
    info = RunInfo(o.title, f"python -m loadtest.report {' '.join(map(str, o.records))}", "")
    try:
        gates = parse_gates(o.gate)
        for path in o.records:
            file = path / "records.jsonl" if path.is_dir() else path
            info.records += read_records(file)
            observed = file.with_name("observations.json")
            if observed.exists():
                found = Observations.from_json(json.loads(observed.read_text()))
                info.observations.shifts += found.shifts
                info.observations.running += found.running
        kinds = {record.workload.partition(":")[0] for record in info.records}
        for workload in (WORKLOADS[kind] for kind in sorted(kinds & set(WORKLOADS))):
            info.slos |= workload.slos
        info.slos |= parse_slos(o.slo, sorted({record.class_name for record in info.records}))
        broken = write_report(info, o.out, gates, None)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print((o.out / "summary.txt").read_text())
    for line in broken:
        print(f"GATE BROKEN: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
