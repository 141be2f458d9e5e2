"""What functions do: actions with the names, arguments, wordings and results that they may have."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from training.tasks.words import (
    ANIMALS,
    CITIES,
    CODENAMES,
    DAYS,
    ITEMS,
    LANGUAGES,
    NAMES,
    NOUNS,
    TEAMS,
    TOPICS,
    VERBS,
)

Value = str | int | float


@dataclass(frozen=True)
class Slot:
    """An argument of an action. names: those it may have; draw: draws a value."""

    names: tuple[str, ...]
    draw: Callable[[random.Random], Value]
    options: tuple[str, ...] = ()
    """All the values there are, which are then the schema's enum."""
    optional: bool = False


@dataclass(frozen=True)
class Action:
    """names and wordings have the keys and, the latter, the slots in braces."""

    names: tuple[str, ...]
    slots: dict[str, Slot]
    wordings: tuple[str, ...]
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What the function's name says, and no argument."""
    results: tuple[str, ...] = ()
    """Keys that a result may have, of RESULTS."""


def _of(words: Sequence[str]) -> Callable[[random.Random], Value]:
    return lambda rng: rng.choice(words)


def _number(low: int, high: int) -> Callable[[random.Random], Value]:
    return lambda rng: rng.randint(low, high)


def _decimal(low: int, high: int) -> Callable[[random.Random], Value]:
    return lambda rng: rng.randint(low, high) + rng.choice((0, 0, 0.5))


def _time(rng: random.Random) -> str:
    return f"{rng.randint(6, 22):02}:{rng.choice((0, 15, 30, 45)):02}"


def _text(rng: random.Random) -> str:
    return rng.choice(TOPICS) + rng.choice(("", " meeting", " notes", " letter"))


_CITY = Slot(("city", "place", "town", "location"), _of(CITIES))
_DAY = Slot(("day", "date", "when"), _of(DAYS), optional=True)
_PERSON = Slot(("name", "person", "to", "user"), _of(NAMES))
_ITEM = Slot(("item", "name", "thing", "product"), _of(ITEMS))
_COUNT = Slot(("count", "number", "amount"), _number(2, 99), optional=True)
_ID = Slot(("id", "number", "key", "code"), _number(10, 9999))
_A, _B = (
    Slot(names, _number(2, 999)) for names in (("a", "x", "first", "left"), ("b", "y", "second", "right"))
)
AFFIXES = (
    "my", "do", "tool", "now", "api", "new", "fast", "one", "x", "main", "web", "all", "info", "data",
    "service",
)  # fmt: skip
"""Parts that any function's name may have besides, so that names are to be read, not guessed."""
RECORDS = ("order", "book", "ticket", "user", "car", "report", "contract", "letter")
_UNITS = ("km", "m", "cm", "kg", "g", "hours", "minutes", "feet", "inches")
_STATES = ("on", "off")
_DEVICES = ("lamp", "engine", "kettle", "door", "candle", "window")

ACTIONS = {
    "weather": Action(
        ("get_weather", "weather", "find_weather", "weather_in", "current_weather", "weather_report"),
        {"city": _CITY, "day": _DAY},
        (
            "How is the weather in {city}?",
            "What is the weather in {city}?",
            "What is the weather like in {city}?",
            "Tell me the weather in {city}.",
            "Weather in {city}?",
            "How is the weather in {city} on {day}?",
            "What will the weather be in {city} on {day}?",
        ),
        results=("temperature", "wind", "sky"),
    ),
    "time": Action(
        ("get_time", "time_in", "current_time", "local_time"),
        {"city": _CITY},
        ("What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}."),
        results=("time",),
    ),
    "convert": Action(
        ("convert", "convert_units", "unit_converter", "change_units"),
        {
            "value": Slot(("value", "amount", "number"), _number(2, 999)),
            "source": Slot(("from", "source", "unit"), _of(_UNITS)),
            "target": Slot(("to", "target", "into"), _of(_UNITS)),
        },
        (
            "How many {target} are {value} {source}?",
            "What is {value} {source} in {target}?",
            "How much is {value} {source} in {target}?",
        ),
        results=("value",),
    ),
    "sum": Action(
        ("add", "sum", "add_numbers", "plus"),
        {"a": _A, "b": _B},
        ("What is {a} plus {b}?", "What is the sum of {a} and {b}?", "How much is {a} plus {b}?"),
        results=("total",),
    ),
    "product": Action(
        ("multiply", "times", "multiply_numbers"),
        {"a": _A, "b": _B},
        ("What is {a} times {b}?", "How much is {a} times {b}?", "Multiply {a} by {b}."),
        results=("total",),
    ),
    "remind": Action(
        ("set_reminder", "remind", "add_reminder", "reminder"),
        {
            "text": Slot(("text", "about", "title", "note"), _text),
            "time": Slot(("time", "at", "hour"), _time),
        },
        ("Remind me of the {text} at {time}.", "At {time} remind me of the {text}."),
        results=("status", "id"),
    ),
    "mail": Action(
        ("send_email", "send_mail", "email", "write_mail"),
        {"to": _PERSON, "text": Slot(("subject", "text", "about", "topic"), _text)},
        (
            "Send {to} a mail about the {text}.",
            "Send a mail to {to} about the {text}.",
            "Mail {to} about the {text}.",
            "Send an e-mail about the {text} to {to}.",
        ),
        results=("status", "id"),
    ),
    "meet": Action(
        ("plan_meeting", "add_meeting", "new_meeting", "meeting"),
        {
            "topic": Slot(("topic", "title", "subject"), _of(TOPICS)),
            "day": Slot(("day", "date", "when"), _of(DAYS)),
            "time": Slot(("time", "at", "hour"), _time, optional=True),
        },
        (
            "Plan a {topic} meeting on {day}.",
            "Plan a {topic} meeting on {day} at {time}.",
            "Make a {topic} meeting on {day} at {time}.",
        ),
        results=("status", "id"),
    ),
    "phone": Action(
        ("call", "call_person", "phone", "start_call"),
        {"name": _PERSON},
        ("Call {name}.", "Phone {name}.", "Please call {name}."),
        results=("status",),
    ),
    "travel": Action(
        ("book_trip", "find_trip", "plan_trip", "book_travel", "trip"),
        {
            "source": Slot(("from", "source", "start"), _of(CITIES)),
            "target": Slot(("to", "target", "end"), _of(CITIES)),
            "day": _DAY,
        },
        (
            "How do I travel from {source} to {target}?",
            "Find a trip from {source} to {target}.",
            "Find a trip from {source} to {target} on {day}.",
            "I want to travel to {target} from {source} on {day}.",
        ),
        results=("price", "time"),
    ),
    "switch": Action(
        ("switch", "turn", "switch_item", "turn_item"),
        {
            "item": Slot(("item", "device", "name"), _of(_DEVICES)),
            "state": Slot(("state", "mode", "to"), _of(_STATES), _STATES),
        },
        ("Turn the {item} {state}.", "Switch the {item} {state}.", "Turn {state} the {item}."),
        results=("state", "status"),
    ),
    "stock": Action(
        ("get_stock", "stock", "in_stock", "find_stock"),
        {"item": _ITEM, "city": Slot(("city", "place", "store"), _of(CITIES), optional=True)},
        (
            "Is the {item} in stock?",
            "Is the {item} in stock in {city}?",
            "Do we have the {item} in stock?",
        ),
        results=("count", "price"),
    ),
    "buy": Action(
        ("buy", "buy_item", "buy_now", "buy_for_me"),
        {"item": _ITEM, "count": _COUNT},
        ("Buy the {item}.", "Buy {count} of the {item}.", "Please buy the {item}."),
        results=("price", "status"),
    ),
    "translate": Action(
        ("translate", "translator", "translate_word", "translate_to"),
        {
            "word": Slot(("text", "word", "name"), _of(ITEMS + ANIMALS)),
            "language": Slot(("language", "to", "target"), _of(LANGUAGES)),
        },
        ("Translate {word} to {language}.", "Translate the {word} to {language}."),
        results=("text", "word"),
    ),
    "staff": Action(
        ("find_people", "people_in", "search_people", "list_people"),
        {
            "team": Slot(("team", "group", "name"), _of(TEAMS)),
            "city": Slot(("city", "place", "office"), _of(CITIES), optional=True),
        },
        ("Who works in {team}?", "Who is in {team}?", "Who works in {team} in {city}?"),
        results=("name", "count"),
    ),
    "read": Action(
        ("get_{record}", "find_{record}", "show_{record}", "{record}_by_id", "read_{record}"),
        {"id": _ID},
        (
            "Find {record} {id}.",
            "Show me {record} {id}.",
            "What is in {record} {id}?",
            "Look up {record} {id}.",
        ),
        {"record": RECORDS},
        results=("name", "price", "status", "title"),
    ),
    "list": Action(
        ("list_{record}s", "all_{record}s", "get_{record}s"),
        {},
        ("List all {record}s.", "Show me all {record}s.", "Which {record}s are there?"),
        {"record": RECORDS},
        results=("count",),
    ),
    "set": Action(
        ("{verb}_{noun}", "{noun}_{verb}"),
        {
            "name": Slot(("name", "item", "of", "server"), _of(CODENAMES)),
            "value": Slot(("value", "to", "new"), _number(2, 999)),
        },
        (
            "Please {verb} the {noun} of {name} to {value}.",
            "I want to {verb} the {noun} of {name} to {value}.",
        ),
        {"verb": VERBS, "noun": NOUNS},
        results=("status", "value"),
    ),
}

_WORDS = (
    "clear",
    "dark",
    "open",
    "closed",
    "small",
    "sent",
    "done",
    "ready",
    "missing",
    "new",
    "old",
    "happy",
)
RESULTS: dict[str, Callable[[random.Random], Value]] = {
    "temperature": _decimal(-9, 39),
    "wind": _number(2, 99),
    "sky": _of(("clear", "dark", "light")),
    "time": _time,
    "value": _number(2, 99999),
    "total": _number(2, 99999),
    "status": _of(_WORDS),
    "state": _of(_STATES),
    "id": _number(10, 9999),
    "price": _decimal(2, 999),
    "count": _number(2, 999),
    "text": _of(CODENAMES),
    "word": _of(CODENAMES),
    "name": _of(NAMES),
    "title": _text,
    "city": _of(CITIES),
    "day": _of(DAYS),
    "team": _of(TEAMS),
    "error": _of(("missing", "not found", "not ready", "closed")),
}
"""What a result says under each key."""


def plain_result(rng: random.Random) -> str:
    """A result that is no JSON object."""
    return str(
        rng.choice(
            (
                RESULTS[rng.choice(sorted(RESULTS))](rng),
                f"{rng.randint(-9, 39)} {rng.choice(('degrees', *_UNITS))}",
                f"{rng.choice(_WORDS)} and {rng.choice(_WORDS)}",
                f"{rng.choice(NAMES)} and {rng.choice(NAMES)}",
                f"{rng.choice(NAMES)} in {rng.choice(CITIES)}",
            )
        )
    )
