"""Puts tables into a Markdown page, between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def update(path: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError where the page has not exactly these tables."""
    text = path.read_text()
    places = re.findall(r"<!-- begin (\S+) -->", text)
    if sorted(places) != sorted(tables):
        raise ValueError(
            f"{path} has places for {', '.join(sorted(places))}, not for {', '.join(sorted(tables))}"
        )
    for name, lines in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{path} has no {end}")
        text = f"{before}{begin}\n" + "\n".join(lines).strip() + f"\n{end}{after}"
    path.write_text(text)
