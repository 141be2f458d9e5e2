"""Lists and tables: sorting, reordering, CSV to Markdown, settings to YAML."""

import random
import re

from training.tasks.family import Family, Params
from training.tasks.words import CITIES, CODENAMES, ITEMS, NAMES, TEAMS

# ---------------------------------------------------------------- sort


def _sort_sample(rng: random.Random) -> Params:
    return {"words": rng.sample(ITEMS, rng.randint(3, 6)), "reverse": rng.random() < 0.3}


def _sort_phrase(params: Params, rng: random.Random) -> str:
    words = ", ".join(params["words"])
    if params["reverse"]:
        return rng.choice(
            (
                f"Sort from z to a: {words}",
                f"Sort these words in reverse alphabetical order: {words}",
                f"Put these in descending order: {words}",
            )
        )
    return rng.choice(
        (
            f"Sort from a to z: {words}",
            f"Sort these words in alphabetical order: {words}",
            f"Put these in ascending order: {words}",
        )
    )


def _numbered(words: list[str]) -> str:
    return "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _parse_numbered(text: str) -> list[str] | None:
    words = []
    for i, line in enumerate(text.strip().split("\n"), 1):
        match = re.fullmatch(r"(\d+)\.\s+(\w+)", line.strip())
        if match is None or int(match[1]) != i:
            return None
        words.append(match[2])
    return words


def _sort_answer(params: Params) -> str:
    return _numbered(sorted(params["words"], reverse=params["reverse"]))


def _sort_check(params: Params, answer: str) -> bool:
    return _parse_numbered(answer) == sorted(params["words"], reverse=params["reverse"])


# ---------------------------------------------------------------- relist: change layout, and order perhaps

_LAYOUTS = ("bullets", "numbers", "arrows", "commas")


def _relist_sample(rng: random.Random) -> Params:
    return {
        "names": rng.sample(NAMES, rng.randint(3, 8)),
        "layout": rng.choice(_LAYOUTS),
        "reverse": rng.random() < 0.5,
    }


def _relist_phrase(params: Params, rng: random.Random) -> str:
    names = ", ".join(params["names"])
    target = {
        "bullets": "a bullet list",
        "numbers": "a numbered list",
        "arrows": "one line with arrows",
        "commas": "one line with commas",
    }[params["layout"]]
    order = "in reversed order" if params["reverse"] else "in the same order"
    return rng.choice(
        (
            f"Rewrite as {target} {order}: {names}",
            f"Make {target} of these names {order}: {names}",
            f"Give me {target} {order} from {names}",
        )
    )


def _relist_order(params: Params) -> list[str]:
    return params["names"][::-1] if params["reverse"] else list(params["names"])


def _relist_answer(params: Params) -> str:
    names = _relist_order(params)
    if params["layout"] == "bullets":
        return "\n".join(f"- {name}" for name in names)
    if params["layout"] == "numbers":
        return _numbered(names)
    return (" -> " if params["layout"] == "arrows" else ", ").join(names)


def _relist_check(params: Params, answer: str) -> bool:
    names: list[str] | None
    if params["layout"] == "numbers":
        names = _parse_numbered(answer)
    elif params["layout"] == "bullets":
        lines = answer.strip().split("\n")
        names = [line[2:].strip() for line in lines] if all(line.startswith("- ") for line in lines) else None
    else:
        names = [name.strip() for name in answer.split("->" if params["layout"] == "arrows" else ",")]
    return names == _relist_order(params)


# ---------------------------------------------------------------- table: CSV to Markdown

_COLUMNS = ("name", "city", "team", "age", "score")


def _table_sample(rng: random.Random) -> Params:
    columns = ["name", *rng.sample(_COLUMNS[1:], 2)]
    rows = []
    for name in rng.sample(NAMES, rng.randint(2, 7)):
        cell = {
            "name": name,
            "city": rng.choice(CITIES),
            "team": rng.choice(TEAMS),
            "age": str(rng.randint(18, 79)),
            "score": str(rng.randint(10, 99)),
        }
        rows.append([cell[column] for column in columns])
    return {"columns": columns, "rows": rows}


def _table_phrase(params: Params, rng: random.Random) -> str:
    csv = "\n".join(",".join(row) for row in [params["columns"], *params["rows"]])
    opening = rng.choice(
        ("Turn this CSV into a Markdown table", "CSV to Markdown", "Format as a Markdown table")
    )
    return f"{opening}:\n{csv}"


def _table_answer(params: Params) -> str:
    rows = [params["columns"], ["---"] * len(params["columns"]), *params["rows"]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _table_check(params: Params, answer: str) -> bool:
    rows = []
    for line in answer.strip().split("\n"):
        line = line.strip()
        if len(line) < 2 or line[0] != "|" or line[-1] != "|":
            return False
        rows.append([cell.strip() for cell in line[1:-1].split("|")])
    if len(rows) < 2 or not all(re.fullmatch(r":?-{3,}:?", cell) for cell in rows[1]):
        return False
    return [rows[0], *rows[2:]] == [params["columns"], *params["rows"]]


# ---------------------------------------------------------------- yaml: settings to YAML

_SECTIONS = ("server", "client", "database", "cache")
_SETTINGS = ("host", "port", "user", "zone", "limit")


def _yaml_sample(rng: random.Random) -> Params:
    sections = []
    for section in rng.sample(_SECTIONS, rng.choice((1, 2, 3, 3))):
        values = {
            "host": rng.choice(CODENAMES),
            "port": str(rng.randint(1000, 9999)),
            "user": rng.choice(NAMES),
            "zone": rng.choice(CITIES),
            "limit": str(rng.randint(10, 99)),
        }
        keys = rng.sample(_SETTINGS, rng.choice((2, 3)))
        sections.append([section, [[key, values[key]] for key in keys]])
    return {"sections": sections}


def _yaml_phrase(params: Params, rng: random.Random) -> str:
    described = "; ".join(
        f"the {section} has " + ", ".join(f"{key} {value}" for key, value in settings)
        for section, settings in params["sections"]
    )
    opening = rng.choice(("Write YAML", "Give me a YAML file", "Turn these settings into YAML"))
    return f"{opening}: {described}."


def _yaml_answer(params: Params) -> str:
    lines = []
    for section, settings in params["sections"]:
        lines.append(f"- section: {section}")
        lines.extend(f"  {key}: {value}" for key, value in settings)
    return "\n".join(lines)


def _yaml_check(params: Params, answer: str) -> bool:
    """Reads the small subset of YAML that the family uses: a list of flat maps."""
    sections: list[tuple[str, list[list[str]]]] = []
    for line in answer.rstrip().split("\n"):
        match = re.fullmatch(r"(- |  )(\w+): (\w+)", line.rstrip())
        if match is None:
            return False
        if match[1] == "- ":
            if match[2] != "section":
                return False
            sections.append((match[3], []))
        elif sections:
            sections[-1][1].append([match[2], match[3]])
        else:
            return False
    return [[section, settings] for section, settings in sections] == params["sections"]


FAMILIES = (
    Family("sort", _sort_sample, _sort_phrase, _sort_answer, _sort_check),
    Family("relist", _relist_sample, _relist_phrase, _relist_answer, _relist_check),
    Family("table", _table_sample, _table_phrase, _table_answer, _table_check),
    Family("yaml", _yaml_sample, _yaml_phrase, _yaml_answer, _yaml_check),
)
