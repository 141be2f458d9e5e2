"""The figures of docs/capacity.md: which mode wins where, what a replica carries, how far from the oracle."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy

from loadtest.simulator.cluster import needed_rounds
from loadtest.simulator.cost import StepTable
from loadtest.simulator.load import Mix
from loadtest.simulator.scenarios import (
    PLANS,
    Contender,
    Machine,
    Outcome,
    Scenario,
    Slo,
    contenders,
    fixed,
    run,
)
from loadtest.simulator.yields import (
    PUBLISHED_BLOCK,
    load_acceptance,
    mean_chance,
    tokens_a_round,
)
from policies.cost import RoundYield
from policies.modes import DecodePlan, Mode

CONTEXT = 800
"""Cached tokens a request, about the mean of the sweep."""
CONCURRENCIES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
ACCEPTANCES = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0)
SATURATION = 0.99
"""A replica carries a rate while this share of the requests is within the SLO."""


def title(plan: DecodePlan) -> str:
    return fixed(plan).title


def rate(table: StepTable, made: RoundYield, concurrency: int) -> float:
    """Tokens a second of `concurrency` requests that all decode, by their mean round."""
    ms = table.ms(concurrency, concurrency * made.rows_per_forward, concurrency * CONTEXT)
    return 1000.0 * concurrency * made.tokens_per_forward / ms


def mean_rounds(machine: Machine) -> dict[DecodePlan, RoundYield]:
    """The mean round by plan, of all categories alike: each runs for as long as its tokens take."""
    acceptance = machine.acceptance
    densities = [acceptance.weights(mean) for mean in acceptance.means.values()]
    found = {}
    for plan, rounds in needed_rounds(PLANS, acceptance).items():
        paces = numpy.array(rounds.paces)
        running = [density / (density @ paces) for density in densities]
        found[plan] = rounds.mean_of(numpy.sum(running, axis=0))
    return found


def modes_lines(machine: Machine) -> Iterator[str]:
    """Tokens/s of each plan by concurrency, the best in bold."""
    mean = mean_rounds(machine)
    yield "| tokens/s at concurrency | " + " | ".join(map(str, CONCURRENCIES)) + " |"
    yield "|" + "---|" * (1 + len(CONCURRENCIES))
    rates = {plan: [rate(machine.table, mean[plan], c) for c in CONCURRENCIES] for plan in PLANS}
    best = [max(column) for column in zip(*rates.values(), strict=True)]
    for plan in PLANS:
        row = [f"**{r:,.0f}**" if r == top else f"{r:,.0f}" for r, top in zip(rates[plan], best, strict=True)]
        yield f"| `{title(plan)}` | " + " | ".join(row) + " |"


def best_splits(rates: Sequence[float]) -> list[tuple[float, int, int]]:
    """Returns for each mean concurrency, from 1, the most tokens/s a replica that any split of the requests
    among many replicas brings, and the two concurrencies it is of.

    rates: tokens/s of one replica by its requests, from 1; without any it makes none. What a split brings
    lies on the line between two of these, the best on the upper hull of them all.
    """
    hull: list[tuple[int, float]] = []
    for point in enumerate((0.0, *rates)):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    found = []
    for concurrency in range(1, len(rates) + 1):
        right = next(number for number, (requests, _) in enumerate(hull) if requests >= concurrency)
        low, high = hull[right - 1], hull[right]
        made = low[1] + _slope(low, high) * (concurrency - low[0])
        found.append((made, low[0] if concurrency < high[0] else concurrency, high[0]))
    return found


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def split_lines(machine: Machine) -> Iterator[str]:
    """What the best split of requests among replicas brings over an even one, each with its best plan."""
    mean = mean_rounds(machine)
    even = [
        max(rate(machine.table, made, c) for made in mean.values()) for c in range(1, CONCURRENCIES[-1] + 1)
    ]
    splits = best_splits(even)
    yield "| requests a replica, on average | " + " | ".join(map(str, CONCURRENCIES)) + " |"
    yield "|" + "---|" * (1 + len(CONCURRENCIES))
    chosen = [(even[c - 1], *splits[c - 1]) for c in CONCURRENCIES]
    yield (
        "| split as | "
        + " | ".join(f"{low} and {high}" if low < high else "even" for *_, low, high in chosen)
        + " |"
    )
    yield "| over an even one | " + " | ".join(f"{made / alike:.3f}" for alike, made, *_ in chosen) + " |"


def winners(machine: Machine, tokens: float, concurrencies: Sequence[int]) -> list[tuple[DecodePlan, float]]:
    """The best plan at each concurrency, and how many times ar's rate it makes.

    tokens: brought by a verified draft at block 32; diffusion's published pace stands as it is
    """
    acceptance = machine.acceptance
    running = acceptance.weights(mean_chance(tokens, PUBLISHED_BLOCK, acceptance.spread))
    made = [rounds.mean_of(running) for rounds in needed_rounds(PLANS, acceptance).values()]
    found = []
    for concurrency in concurrencies:
        rates = {mean.plan: rate(machine.table, mean, concurrency) for mean in made}
        best = max(rates, key=lambda plan: rates[plan])
        found.append((best, rates[best] / rates[PLANS[0]]))
    return found


def crossover_lines(machine: Machine) -> Iterator[str]:
    yield "| tokens a draft at block 32 | " + " | ".join(f"C = {c}" for c in CONCURRENCIES) + " |"
    yield "|" + "---|" * (1 + len(CONCURRENCIES))
    for tokens in ACCEPTANCES:
        cells = [
            f"`{title(plan)}`" + ("" if plan.mode is Mode.AR else f" {gain:.1f}x")
            for plan, gain in winners(machine, tokens, CONCURRENCIES)
        ]
        yield f"| {tokens:g} | " + " | ".join(cells) + " |"


@dataclass(frozen=True, slots=True)
class Carried:
    """The highest rate that a replica carries within the SLO."""

    policy: str
    rate: float
    """Requests a second."""
    outcome: Outcome
    """The run at that rate."""


def carried(
    machine: Machine,
    contender: Contender,
    slo: Slo,
    mix: Mix,
    num_requests: int,
    highest: float,
    seed: int = 0,
) -> Carried:
    """Finds the rate by bisection, to 3 %, over Poisson arrivals at one replica."""
    low, high, outcome = 0.0, highest, None
    while high - low > 0.03 * high:
        middle = (low + high) / 2
        found = run(Scenario("one", 1, middle, mix=mix), machine, contender, num_requests, seed, slo)
        if found.good_share >= SATURATION:
            low, outcome = middle, found
        else:
            high = middle
    if outcome is None:
        outcome = run(Scenario("one", 1, high, mix=mix), machine, contender, num_requests, seed, slo)
    return Carried(contender.title, low, outcome)


def carried_lines(machine: Machine, slos: Sequence[Slo], num_requests: int, seed: int = 0) -> Iterator[str]:
    heads = [f"TTFT {slo.ttft_s:g} s, TPOT {1000 * slo.tpot_s:g} ms" for slo in slos]
    yield "| requests/s a replica carries within | " + " | ".join(heads) + " |"
    yield "|" + "---|" * (1 + len(heads))
    columns = [
        [carried(machine, contender, slo, Mix(), num_requests, 60.0, seed) for contender in contenders(slo)]
        for slo in slos
    ]
    for row in zip(*columns, strict=True):
        cells = [f"{found.rate:.1f}" if found.rate else "none" for found in row]
        yield f"| `{row[0].policy}` | " + " | ".join(cells) + " |"


def plot_modes(machines: Sequence[Machine], path: str) -> None:
    """Tokens/s by concurrency, one panel a machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(machines), figsize=(5.5 * len(machines), 4), squeeze=False)
    for panel, machine in zip(panels[0], machines, strict=True):
        mean = mean_rounds(machine)
        for plan in PLANS:
            rates = [rate(machine.table, mean[plan], c) for c in range(1, 129)]
            style = "--" if plan.mode is Mode.AR else "-"
            panel.plot(range(1, 129), rates, style, label=title(plan))
        panel.set(
            title=f"{machine.name}, from public figures",
            xlabel="requests decoding at once",
            ylabel="tokens/s (simulated)",
            xscale="log",
            yscale="log",
        )
        panel.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], labels=["1", "2", "4", "8", "16", "32", "64", "128"])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_crossover(machines: Sequence[Machine], path: str) -> None:
    """The winning plan over acceptance and concurrency, one panel a machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, patches, pyplot

    palette = ["#bbbbbb", "#9ecae1", "#4292c6", "#08519c", "#fdae6b"]
    tokens = [1.5 + 0.25 * step for step in range(43)]
    figure, panels = pyplot.subplots(1, len(machines), figsize=(5.5 * len(machines), 4), squeeze=False)
    for panel, machine in zip(panels[0], machines, strict=True):
        panel.set_xlim(1, 128)
        won = [[PLANS.index(plan) for plan, _ in winners(machine, t, range(1, 129))] for t in tokens]
        colouring = colors.ListedColormap(palette)
        panel.pcolormesh(range(1, 129), tokens, won, cmap=colouring, vmin=-0.5, vmax=len(PLANS) - 0.5)
        published = load_acceptance()
        for name in ("writing", "coding", "multilingual"):
            level = tokens_a_round(published.means[name], published.spread, 32)
            panel.axhline(level, color="k", lw=0.6, ls=":")
            panel.text(1.05, level + 0.05, name, fontsize=7)
        panel.set(
            title=f"{machine.name}: fastest plan",
            xlabel="requests decoding at once",
            ylabel="tokens a verified draft at block 32",
            xscale="log",
        )
        panel.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], labels=["1", "2", "4", "8", "16", "32", "64", "128"])
        keys = [patches.Patch(color=palette[index], label=title(plan)) for index, plan in enumerate(PLANS)]
        panel.legend(handles=keys, fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
