"""Numbers: addition column by column, unit conversion, date conversion."""

import random
import re
from datetime import date

from training.tasks.family import Family, Params
from training.tasks.words import MONTHS

# ---------------------------------------------------------------- add


def _add_sample(rng: random.Random) -> Params:
    digits = rng.choice((2, 3, 3, 4, 4))
    low, high = 10 ** (digits - 1), 10**digits - 1
    return {"a": rng.randint(low, high), "b": rng.randint(low, high)}


def _add_phrase(params: Params, rng: random.Random) -> str:
    a, b = params["a"], params["b"]
    return rng.choice(
        (
            f"Add {a} and {b} step by step.",
            f"What is {a} + {b}? Show the steps.",
            f"Work out {a} + {b} column by column.",
        )
    )


def _add_answer(params: Params) -> str:
    a, b, carry = str(params["a"]), str(params["b"]), 0
    lines = []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    return "\n".join([*lines, f"{a} + {b} = {params['a'] + params['b']}"])


def _add_check(params: Params, answer: str) -> bool:
    lines = answer.strip().split("\n")
    carry = 0
    for line, x, y in zip(lines, reversed(str(params["a"])), reversed(str(params["b"])), strict=False):
        match = re.fullmatch(r"(\d) \+ (\d) \+ (\d) = (\d+), write (\d), carry (\d)", line)
        if match is None:
            return False
        total = int(x) + int(y) + carry
        if [int(g) for g in match.groups()] != [int(x), int(y), carry, total, total % 10, total // 10]:
            return False
        carry = total // 10
    expected = f"{params['a']} + {params['b']} = {params['a'] + params['b']}"
    return len(lines) == len(str(params["a"])) + 1 and lines[-1] == expected


# ---------------------------------------------------------------- units

_POWER_OF_TEN = (("km", "m", 1000), ("kg", "g", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("l", "ml", 1000))
_OTHER = (
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("dozens", "pieces", 12),
)


def _units_sample(rng: random.Random) -> Params:
    conversions = []
    for source, target, factor in rng.sample((*_POWER_OF_TEN, *_OTHER), rng.choice((2, 3, 4))):
        small = (source, target, factor) in _OTHER
        amount = rng.randint(2, 12) if small else rng.choice((rng.randint(2, 99), rng.randint(100, 999)))
        conversions.append([amount, source, target, factor])
    return {"conversions": conversions}


def _units_phrase(params: Params, rng: random.Random) -> str:
    asked = ", ".join(f"{amount} {source} to {target}" for amount, source, target, _ in params["conversions"])
    return rng.choice((f"Convert {asked}.", f"Convert these units: {asked}", f"Change units: {asked}"))


def _units_answer(params: Params) -> str:
    return "\n".join(
        f"{amount} {source} x {factor} = {amount * factor} {target}"
        for amount, source, target, factor in params["conversions"]
    )


def _units_check(params: Params, answer: str) -> bool:
    lines = answer.strip().split("\n")
    if len(lines) != len(params["conversions"]):
        return False
    for line, (amount, source, target, factor) in zip(lines, params["conversions"], strict=True):
        match = re.fullmatch(r"(\d+) (\w+) x (\d+) = (\d+) (\w+)", line.strip())
        if match is None:
            return False
        if match[2] != source or match[5] != target or int(match[3]) != factor:
            return False
        if int(match[1]) != amount or int(match[4]) != amount * factor:
            return False
    return True


# ---------------------------------------------------------------- dates

_FORMATS = ("ISO", "dotted", "US", "long")


def _write_date(day: date, style: str) -> str:
    if style == "ISO":
        return day.isoformat()
    if style == "dotted":
        return f"{day.day:02}.{day.month:02}.{day.year}"
    if style == "US":
        return f"{day.month:02}/{day.day:02}/{day.year}"
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _dates_sample(rng: random.Random) -> Params:
    source, target = rng.sample(_FORMATS, 2)
    days = [
        date(rng.randint(1970, 2039), rng.randint(1, 12), rng.randint(1, 28)).isoformat()
        for _ in range(rng.choice((1, 2, 3, 4)))
    ]
    return {"source": source, "target": target, "days": days}


def _dates_phrase(params: Params, rng: random.Random) -> str:
    days = ", ".join(_write_date(date.fromisoformat(d), params["source"]) for d in params["days"])
    return rng.choice(
        (
            f"Write in {params['target']} date format: {days}",
            f"Convert these dates to {params['target']} format: {days}",
            f"Change to {params['target']} dates: {days}",
        )
    )


def _dates_answer(params: Params) -> str:
    lines = []
    for iso in params["days"]:
        day = date.fromisoformat(iso)
        lines.append(f"{_write_date(day, params['source'])} is {_write_date(day, params['target'])}")
    return "\n".join(lines)


def _parse_date(text: str, style: str) -> date | None:
    try:
        if style == "ISO":
            return date.fromisoformat(text)
        if style == "dotted":
            day, month, year = text.split(".")
        elif style == "US":
            month, day, year = text.split("/")
        else:
            day, name, year = text.split(" ")
            month = str(MONTHS.index(name) + 1)
        return date(int(year), int(month), int(day))
    except ValueError:
        return None


def _dates_check(params: Params, answer: str) -> bool:
    lines = answer.strip().split("\n")
    if len(lines) != len(params["days"]):
        return False
    for line, iso in zip(lines, params["days"], strict=True):
        left, middle, right = line.partition(" is ")
        wanted = date.fromisoformat(iso)
        if not middle or _parse_date(left, params["source"]) != wanted:
            return False
        if _parse_date(right, params["target"]) != wanted:
            return False
    return True


FAMILIES = (
    Family("add", _add_sample, _add_phrase, _add_answer, _add_check),
    Family("units", _units_sample, _units_phrase, _units_answer, _units_check),
    Family("dates", _dates_sample, _dates_phrase, _dates_answer, _dates_check),
)
