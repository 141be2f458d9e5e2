"""Markdown tables of the scenarios' outcomes: each policy against the best fixed plan and the oracle."""

from collections.abc import Iterator, Sequence

from loadtest.simulator.scenarios import ORACLE, PLANS, Outcome, best_of, fixed
from policies.registry import POLICIES

FIXED = tuple(fixed(plan).title for plan in PLANS)
ADAPTIVE = tuple(name for name in POLICIES if name != "fixed")


def table_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The lines of a Markdown table for each scenario."""
    for name in dict.fromkeys(outcome.scenario for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.scenario == name]
        best, oracle = _bounds(mine)
        yield f"**{name}** ({mine[0].num_requests:,} requests)"
        yield ""
        yield (
            "| policy | tokens/s | goodput/s | within SLO | of best fixed | of oracle "
            "| TTFT p50 / p95 / p99, ms | TPOT p50 / p95 / p99, ms | shifts/min | shed | lost |"
        )
        yield "|" + "---|" * 11
        for o in mine:
            mark = " (best fixed)" if o is best else ""
            ttft = " / ".join(f"{1000 * value:.0f}" for value in o.ttft_s)
            tpot = " / ".join(f"{1000 * value:.1f}" for value in o.tpot_s)
            yield (
                f"| {o.policy}{mark} | {o.tokens_per_s:,.0f} | {o.goodput:,.1f} | {o.good_share:.1%} | "
                f"{_ratio(o, best)} | {_ratio(o, oracle)} | {ttft} | {tpot} | "
                f"{o.shifts:.1f} | {o.num_shed:,} | {o.num_lost:,} |"
            )
        yield ""


def summary_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A row a scenario: the best fixed plan, and the goodput of each policy against it and the oracle's."""
    heads = " | ".join(f"`{name}` of best fixed / of oracle" for name in ADAPTIVE)
    yield (
        f"| scenario | requests | best fixed | within SLO | worst fixed | {heads} "
        "| TPOT p50, best fixed / `cost_model`, ms |"
    )
    yield "|" + "---|" * (6 + len(ADAPTIVE))
    for name in dict.fromkeys(outcome.scenario for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.scenario == name]
        best, oracle = _bounds(mine)
        by_name = {outcome.policy: outcome for outcome in mine}
        if best is None:
            raise ValueError(f"no fixed plan ran through {name!r}")
        worst = min((by_name[title] for title in FIXED), key=lambda o: o.goodput)
        cells = [f"{_ratio(by_name[name], best)} / {_ratio(by_name[name], oracle)}" for name in ADAPTIVE]
        paces = f"{1000 * best.tpot_s[0]:.1f} / {1000 * by_name['cost_model'].tpot_s[0]:.1f}"
        yield (
            f"| {name} | {best.num_requests:,} | `{best.policy}` | {best.good_share:.1%} | "
            f"`{worst.policy}` {_ratio(worst, best)} | {' | '.join(cells)} | {paces} |"
        )


def _bounds(outcomes: Sequence[Outcome]) -> tuple[Outcome | None, Outcome | None]:
    """The outcomes of the best fixed plan and of the oracle; None for one that is missing."""
    plans = [outcome for outcome in outcomes if outcome.policy in FIXED]
    oracle = next((outcome for outcome in outcomes if outcome.policy == ORACLE), None)
    return best_of(plans) if plans else None, oracle


def _ratio(outcome: Outcome, other: Outcome | None) -> str:
    if other is None or other.goodput == 0:
        return "-"
    return f"{outcome.goodput / other.goodput:.2f}"
