"""Puts tables into a Markdown page, between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def check_places(path: Path, names: Iterable[str]) -> None:
    """Raises ValueError where the page has not a place for exactly these tables."""
    places = sorted(re.findall(r"<!-- begin (\S+) -->", path.read_text()))
    if places != sorted(names):
        raise ValueError(f"{path} has places for {', '.join(places)}, not for {', '.join(sorted(names))}")


def update(path: Path, name: str, lines: Sequence[str]) -> None:
    """Writes the table's lines into its place. Raises ValueError where the page has none."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, begun, rest = path.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{path} has no {begin} with an {end} after it")
    path.write_text(f"{before}{begin}\n" + "\n".join(lines).strip() + f"\n{end}{after}")
