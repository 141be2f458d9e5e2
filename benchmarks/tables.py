"""Tables in Markdown, and lines that say whether an aim is met."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join((f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body))


def verdict(what: str, is_met: bool) -> str:
    return f"- {'met' if is_met else '**not met**'}: {what}"


def section(text: str, *verdicts: str) -> str:
    """A table and the verdicts under it."""
    return "\n\n".join((text, "\n".join(verdicts))) if verdicts else text
