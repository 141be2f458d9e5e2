"""A run in one small table, for a README: a line a setting, a column a level of load."""

from collections.abc import Mapping, Sequence

from loadtest.metrics import Summary, summarise
from loadtest.records import Record
from loadtest.slo import Slo


def overview(records: Sequence[Record], slos: Mapping[str, Slo]) -> list[list[str]]:
    """The table's head, then its lines: E2E p50 / p95 in ms at each level, or stage if there are no levels.

    The figures after them are over all those levels. Raises ValueError without records.
    """
    leveled = [r for r in records if r.level is not None] or list(records)
    stages = list(dict.fromkeys(r.stage for r in leveled))
    lines = [["E2E p50 / p95, ms", *stages, "tokens a forward", "right %", "errors"]]
    for setting in dict.fromkeys(r.setting for r in leveled):
        its = [r for r in leveled if r.setting == setting]
        by_stage = {stage: [r for r in its if r.stage == stage] for stage in stages}
        cells = [_e2e(summarise(group, slos)) if group else "-" for group in by_stage.values()]
        whole = summarise(its, slos)
        forward = "-" if whole.tokens_per_forward is None else f"{whole.tokens_per_forward:.2f}"
        right = "-" if whole.correct is None else f"{100 * whole.correct:.1f}"
        lines.append([f"`{setting}`", *cells, forward, right, str(sum(whole.errors.values()))])
    return lines


def _e2e(summary: Summary) -> str:
    middle, high = summary.e2e.p(50), summary.e2e.p(95)
    return "-" if middle is None or high is None else f"{1000 * middle:.0f} / {1000 * high:.0f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is the head."""
    head, *body = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *body))
