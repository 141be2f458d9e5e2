"""Records: JSON from sentences, SQL from a request."""

import json
import random
import re
import sqlite3

from training.tasks.family import Family, Params
from training.tasks.words import CITIES, LANGUAGES, NAMES, SURNAMES, TEAMS

# ---------------------------------------------------------------- JSON

_JSON_KEYS = ("name", "age", "city", "team", "language")


def _json_sample(rng: random.Random) -> Params:
    count = rng.choice((1, 2, 3, 4))
    keys = rng.sample(_JSON_KEYS, rng.choice((3, 4)))
    people = [
        {
            "name": f"{name} {rng.choice(SURNAMES)}",
            "age": rng.randint(18, 79),
            "city": rng.choice(CITIES),
            "team": rng.choice(TEAMS),
            "language": rng.choice(LANGUAGES),
        }
        for name in rng.sample(NAMES, count)
    ]
    return {"keys": keys, "people": people}


def _json_phrase(params: Params, rng: random.Random) -> str:
    style = rng.randrange(2)
    sentences = []
    for p in params["people"]:
        if style == 0:
            sentences.append(
                f"{p['name']} is {p['age']}, lives in {p['city']}, works in {p['team']} "
                f"and speaks {p['language']}."
            )
        else:
            sentences.append(
                f"{p['name']} from {p['city']} speaks {p['language']}, works in {p['team']} "
                f"and is {p['age']}."
            )
    keys = ", ".join(params["keys"])
    opening = rng.choice(("Extract as JSON", "Give me JSON", "Turn this into JSON"))
    return f"{opening} with the keys {keys}: {' '.join(sentences)}"


def _json_rows(params: Params) -> list[dict[str, object]]:
    return [{key: person[key] for key in params["keys"]} for person in params["people"]]


def _json_answer(params: Params) -> str:
    return "[\n" + ",\n".join("  " + json.dumps(row) for row in _json_rows(params)) + "\n]"


def _json_check(params: Params, answer: str) -> bool:
    try:
        rows = json.loads(answer)
    except ValueError:
        return False
    return rows == _json_rows(params)


# ---------------------------------------------------------------- SQL

_TABLES = {
    "people": ("name", "age", "city", "team"),
    "orders": ("item", "price", "city", "day"),
    "books": ("title", "pages", "language", "price"),
    "cars": ("model", "speed", "price", "city"),
}
_NUMERIC = ("age", "price", "pages", "speed")
_TEXT_VALUES = {"city": CITIES, "team": TEAMS, "language": LANGUAGES}


def _sql_sample(rng: random.Random) -> Params:
    table = rng.choice(sorted(_TABLES))
    columns = _TABLES[table]
    text = [c for c in columns if c in _TEXT_VALUES]
    numeric = [c for c in columns if c in _NUMERIC]
    kind = rng.choice(("list", "list", "count", "average"))
    params: Params = {"table": table, "kind": kind}
    if kind == "list":
        params["columns"] = rng.sample(columns, rng.choice((2, 3)))
        params["order"] = [rng.choice(numeric), rng.choice(("ascending", "descending"))]
        params["limit"] = rng.randint(2, 99)
    elif kind == "count":
        params["columns"] = [rng.choice(text)]
    else:
        params["columns"] = [rng.choice(text), rng.choice(numeric)]
    where_text = rng.choice(text)
    params["equals"] = [where_text, rng.choice(_TEXT_VALUES[where_text])]
    params["compare"] = [rng.choice(numeric), rng.choice(("above", "below")), rng.randint(10, 99)]
    return params


def _sql_phrase(params: Params, rng: random.Random) -> str:
    column, value = params["equals"]
    number, direction, bound = params["compare"]
    where = f"where the {column} is {value} and the {number} is {direction} {bound}"
    opening = rng.choice(("Write SQL to", "Give me an SQL query to", "In SQL,"))
    if params["kind"] == "list":
        order, way = params["order"]
        columns = ", ".join(params["columns"])
        return (
            f"{opening} list the columns {columns} of {params['table']} {where}, "
            f"by {order} {way}, at most {params['limit']} rows."
        )
    if params["kind"] == "count":
        return f"{opening} count the {params['table']} per {params['columns'][0]} {where}."
    group, measured = params["columns"]
    return f"{opening} find the average {measured} of {params['table']} per {group} {where}."


def _sql_answer(params: Params) -> str:
    column, value = params["equals"]
    number, direction, bound = params["compare"]
    where = f"WHERE {column} = '{value}' AND {number} {'>' if direction == 'above' else '<'} {bound}"
    table = params["table"]
    if params["kind"] == "list":
        order, way = params["order"]
        return (
            f"SELECT {', '.join(params['columns'])}\nFROM {table}\n{where}\n"
            f"ORDER BY {order} {'ASC' if way == 'ascending' else 'DESC'}\nLIMIT {params['limit']};"
        )
    if params["kind"] == "count":
        group = params["columns"][0]
        return f"SELECT {group}, COUNT(*)\nFROM {table}\n{where}\nGROUP BY {group};"
    group, measured = params["columns"]
    return f"SELECT {group}, AVG({measured})\nFROM {table}\n{where}\nGROUP BY {group};"


def _sql_check(params: Params, answer: str) -> bool:
    """True if the statement compiles in SQLite against the schema and is the reference up to white space."""
    if re.sub(r"\s+", " ", answer).strip() != re.sub(r"\s+", " ", _sql_answer(params)):
        return False
    database = sqlite3.connect(":memory:")
    try:
        for table, columns in _TABLES.items():
            database.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
        database.execute("EXPLAIN " + answer)
    except sqlite3.Error:
        return False
    finally:
        database.close()
    return True


FAMILIES = (
    Family("json", _json_sample, _json_phrase, _json_answer, _json_check),
    Family("sql", _sql_sample, _sql_phrase, _sql_answer, _sql_check),
)
