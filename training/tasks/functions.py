"""Functions to offer and requests for them, under names and arguments that vary.

An offer is a function that does an action: JSON-able parameters with a name and names and schemas of
arguments, drawn so that only the list of functions says what to write.
"""

import random
from string import Formatter
from typing import Any

from training.tasks.actions import ACTIONS, AFFIXES, Slot
from training.tasks.family import Params


def fields_of(wording: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(wording) if name}


def offer(rng: random.Random) -> Params:
    """A function for some action: its name, what that says, and its arguments by slot.

    An argument is its name, its schema and whether it is required.
    """
    action = rng.choice(sorted(ACTIONS))
    does = ACTIONS[action]
    keys = {key: rng.choice(words) for key, words in does.keys.items()}
    slots = [s for s, slot in does.slots.items() if not slot.optional or rng.random() < 0.5]
    if rng.random() < 0.3:
        rng.shuffle(slots)
    arguments: dict[str, list[Any]] = {}
    for slot in slots:
        taken = {name for name, _, _ in arguments.values()}
        name = rng.choice([name for name in does.slots[slot].names if name not in taken])
        arguments[slot] = [name, _schema(does.slots[slot], rng), not does.slots[slot].optional]
    name = rng.choice(does.names).format(**keys)
    if rng.random() < 0.15:
        affix = rng.choice(AFFIXES)
        name = f"{affix}_{name}" if rng.random() < 0.5 else f"{name}_{affix}"
    return {"action": action, "name": name, "keys": keys, "arguments": arguments}


def _schema(slot: Slot, rng: random.Random) -> dict[str, Any]:
    if slot.options:
        return {"type": "string", "enum": list(slot.options)}
    example = slot.draw(rng)
    if isinstance(example, int):
        return {"type": rng.choice(("integer",) * 6 + ("number", "string", "string"))}
    if rng.random() < 0.08:
        some: set[str] = set()
        while len(some) < 3:
            some.add(str(slot.draw(rng)))
        return {"type": "string", "enum": sorted(some)}
    return {"type": "string"}


def offers(rng: random.Random, count: int, missing: Params | None = None) -> list[Params]:
    """Different functions, none of which does what `missing` does."""
    found: list[Params] = []
    while len(found) < count:
        one = offer(rng)
        others = found if missing is None else [*found, missing]
        if all(one["name"] != o["name"] and _does(one) != _does(o) for o in others):
            found.append(one)
    return found


def _does(function: Params) -> tuple[Any, ...]:
    return function["action"], *function["keys"].values()


def values(function: Params, rng: random.Random) -> Params:
    """Values for a request: of the slots that one of the wordings that can be asked speaks of."""
    does = ACTIONS[function["action"]]
    arguments = function["arguments"]
    wordings = [fields_of(w) - does.keys.keys() for w in does.wordings]
    slots = rng.choice([fields for fields in wordings if fields <= arguments.keys()])
    found: Params = {}
    for slot in sorted(slots):
        options = arguments[slot][1].get("enum")
        taken = set(found.values())
        while (value := rng.choice(options) if options else does.slots[slot].draw(rng)) in taken:
            if options and set(options) <= taken:
                break
        found[slot] = value
    return found


def request(function: Params, given: Params, rng: random.Random) -> str:
    """A request that only this function, of those offered, can do with these values."""
    does = ACTIONS[function["action"]]
    if given and rng.random() < 0.08:
        said = " and ".join(f"{function['arguments'][slot][0]} {value}" for slot, value in given.items())
        return f"{rng.choice(('Use', 'Run'))} {function['name']} with {said}."
    fields = does.keys.keys() | given.keys()
    wording = rng.choice([w for w in does.wordings if fields_of(w) == fields])
    if rng.random() < 0.15:
        wording = wording.replace("What is", "What's").rstrip(".?")
    return wording.format(**function["keys"], **given)


def call(function: Params, given: Params) -> dict[str, Any]:
    """The call that does it: arguments in the order of the function's."""
    arguments = {}
    for slot, (name, schema, _) in function["arguments"].items():
        if slot in given:
            arguments[name] = str(given[slot]) if schema["type"] == "string" else given[slot]
    return {"name": function["name"], "arguments": arguments}


def tool(function: Params) -> dict[str, Any]:
    """The function in OpenAI's form."""
    properties = {name: schema for name, schema, _ in function["arguments"].values()}
    required = [name for name, _, required in function["arguments"].values() if required]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": function["name"], "parameters": parameters}}
