"""Plots of the rows of one part."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.policy.aims import grouped, rates
from benchmarks.policy.contenders import AUTO
from benchmarks.policy.rows import Row


def plot(part: str, found: Sequence[Row], path: Path) -> None:
    """Draws tokens/s by contender into a PNG: over the levels, or over the steps of a wave."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    if part == "levels":
        by_place = {row.clients: row.clients for row in sorted(found, key=lambda row: row.clients)}
        places = grouped(found, lambda row: row.clients)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("clients, each with one request at a time")
    else:
        by_place = {int(row.label): row.clients for row in sorted(found, key=lambda row: int(row.label))}
        places = grouped(found, lambda row: int(row.label))
        axes.set_xlabel(f"clients, in steps of {found[0].seconds:.0f} s, one after the other")
    of_place = {place: rates(own) for place, own in sorted(places.items())}
    for name in dict.fromkeys(row.contender for row in found):
        points = [(place, seen[name].median) for place, seen in of_place.items() if name in seen]
        axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=3 if name == AUTO else 1)
    axes.set_xticks(list(by_place), [str(clients) for clients in by_place.values()])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"tokens/s ({found[0].run['workload']} prompts)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
