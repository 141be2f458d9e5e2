"""Tools: calls of the functions offered, answers where none fits, and answers made of results."""

import json
import random
import re
from collections.abc import Mapping
from typing import Any

from training.tasks.actions import ACTIONS, RESULTS, plain_result
from training.tasks.family import Chat, Family, Message, Params, is_held_out
from training.tasks.functions import call, offer, offers, request, tool, values

NO_TOOL = "I have no tool for that."
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You can use tools.",
    "Use the tools if they help.",
    "You are Triad, a helpful assistant with tools.",
    "Be brief.",
)

Call = dict[str, Any]


def write_calls(calls: list[Call]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(each)}\n</tool_call>" for each in calls)


def read_calls(text: str) -> list[Call] | None:
    """The calls of an answer that is nothing else; None for another."""
    found = re.findall(r"<tool_call>\n(.*)\n</tool_call>", text)
    try:
        calls = [json.loads(each) for each in found]
    except ValueError:
        return None
    return calls if "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in found) == text else None


def _asked(params: Params) -> tuple[str, Any]:
    """What the split goes by: the functions' actions and the values, under whatever names and wordings."""
    functions: list[Params] = params.get("missing") or params["offers"]
    found = []
    for number, given in params["asked"]:
        function = functions[number]
        found.append([function["action"], function["keys"], given])
    return "tools", found


def _calls(params: Params) -> list[Call]:
    return [call(params["offers"][number], given) for number, given in params["asked"]]


def _calls_answer(params: Params) -> str:
    return write_calls(_calls(params))


def _calls_check(params: Params, answer: str) -> bool:
    return read_calls(answer) == _calls(params)


def _offered(params: Params, messages: list[Message]) -> Chat:
    return Chat(messages, [tool(function) for function in params["offers"]])


def _called(calls: list[Call], results: list[str]) -> list[Message]:
    """A message with calls, and one for each result."""
    made = [
        {"id": f"call_{number}", "type": "function", "function": each} for number, each in enumerate(calls)
    ]
    answers = [
        {"role": "tool", "tool_call_id": f"call_{number}", "content": result}
        for number, result in enumerate(results)
    ]
    return [{"role": "assistant", "content": "", "tool_calls": made}, *answers]


# ---------------------------------------------------------------- one call, perhaps after another one


def _call_sample(rng: random.Random) -> Params:
    found = offers(rng, rng.choice((1, 1, 2, 2, 3)))
    number = rng.randrange(len(found))
    params = {"offers": found, "asked": [[number, values(found[number], rng)]], "before": []}
    if rng.random() < 0.12:
        params["before"] = _earlier(found, rng)
    return params


def _earlier(found: list[Params], rng: random.Random) -> list[Any]:
    """A request that was answered before, none of the held-out split: its function, values and result."""
    number = rng.randrange(len(found))
    given = values(found[number], rng)
    if is_held_out(*_asked({"offers": found, "asked": [[number, given]]})):
        return []
    return [[number, given, _result(found[number], rng)]]


def _request_phrase(params: Params, rng: random.Random) -> str:
    (number, given), *more = params["asked"]
    function = (params.get("missing") or params["offers"])[number]
    if not more:
        return request(function, given, rng)
    ((other_number, other),) = more
    differing = [slot for slot in given if given[slot] != other.get(slot)]
    if other_number == number and given.keys() == other.keys() and len(differing) == 1:
        (slot,) = differing
        return request(function, {**given, slot: f"{given[slot]} and {other[slot]}"}, rng)
    first = request(function, given, rng)
    between = " " if first[-1] in ".?" else " and "
    return first + between + request(params["offers"][other_number], other, rng)


def _call_chat(params: Params, prompt: str, rng: random.Random) -> Chat:
    messages: list[Message] = []
    for number, given, result in params.get("before", ()):
        function = params["offers"][number]
        messages.append({"role": "user", "content": request(function, given, rng)})
        messages.extend(_called([call(function, given)], [result]))
        messages.append({"role": "assistant", "content": _say(result)})
    return _offered(params, [*messages, {"role": "user", "content": prompt}])


# ---------------------------------------------------------------- two calls


def _two(rng: random.Random, found: list[Params]) -> list[Any]:
    """Two different requests, in half of the cases for one function with one value of another kind."""
    while True:
        first = rng.randrange(len(found))
        given = values(found[first], rng)
        second = first if rng.random() < 0.6 else rng.randrange(len(found))
        other = values(found[second], rng)
        if second == first and given and given.keys() == other.keys() and rng.random() < 0.7:
            changed = rng.choice(sorted(given))
            other = {**given, changed: other[changed]}
        if second != first or (given and other != given):
            return [[first, given], [second, other]]


def _two_sample(rng: random.Random) -> Params:
    found = offers(rng, rng.choice((1, 1, 2, 2, 3)))
    if len(found) == 1 and not found[0]["arguments"]:
        return _two_sample(rng)
    return {"offers": found, "asked": _two(rng, found)}


# ---------------------------------------------------------------- no function fits


def _none_sample(rng: random.Random) -> Params:
    missing = offer(rng)
    found = offers(rng, rng.choice((0, 1, 1, 2, 2, 3)), missing)
    return {"offers": found, "missing": [missing], "asked": [[0, values(missing, rng)]]}


def _none_answer(params: Params) -> str:
    return NO_TOOL


def _none_check(params: Params, answer: str) -> bool:
    return answer.split() == NO_TOOL.split()


# ---------------------------------------------------------------- an answer made of results


def _result(function: Params, rng: random.Random) -> str:
    """What a function gives back: an object in JSON, or a word or number."""
    keys = ACTIONS[function["action"]].results
    chance = rng.random()
    if chance < 0.2:
        return plain_result(rng)
    if chance < 0.25:
        keys = ("error",)
    elif chance < 0.4:
        keys = tuple(rng.sample(sorted(RESULTS), rng.randint(1, 3)))
    some = rng.sample(keys, rng.randint(1, min(3, len(keys))))
    separators = (", ", ": ") if rng.random() < 0.75 else (",", ":")
    return json.dumps({key: RESULTS[key](rng) for key in some}, separators=separators)


def _say(result: str) -> str:
    """A sentence that says a result: of an object each key and value, in order."""
    try:
        said = json.loads(result)
    except ValueError:
        said = result
    facts = said if isinstance(said, dict) else {"result": said}
    *most, last = [f"the {key} is {value}" for key, value in facts.items()]
    sentence = f"{', '.join(most)} and {last}." if most else f"{last}."
    return sentence[0].upper() + sentence[1:]


def _result_sample(rng: random.Random) -> Params:
    found = offers(rng, rng.choice((1, 1, 2)))
    asked: list[Any] = [[0, values(found[0], rng)]]
    if rng.random() < 0.2:
        other = [len(found) - 1, values(found[-1], rng)]
        asked += [other] if other not in asked else []
    results = [_result(found[number], rng) for number, _ in asked]
    return {"offers": found, "asked": asked, "results": results}


def _result_answer(params: Params) -> str:
    return " ".join(_say(result) for result in params["results"])


def _result_check(params: Params, answer: str) -> bool:
    return answer.split() == _result_answer(params).split()


def _result_chat(params: Params, prompt: str, rng: random.Random) -> Chat:
    messages = [{"role": "user", "content": prompt}, *_called(_calls(params), params["results"])]
    return Chat(messages) if rng.random() < 0.1 else _offered(params, messages)


# ---------------------------------------------------------------- requests that need no function


def _aside(ordinary: Mapping[str, Family]) -> Family:
    """The tasks of these families while functions are offered, none of which they need."""

    def family(params: Params) -> Family:
        return ordinary[params["family"]]

    def sample(rng: random.Random) -> Params:
        name = rng.choice(sorted(ordinary))
        functions = offers(rng, rng.choice((1, 1, 2, 3)))
        return {"offers": functions, "family": name, "params": ordinary[name].sample(rng)}

    return Family(
        "tool_aside",
        sample,
        phrase=lambda params, rng: family(params).phrase(params["params"], rng),
        answer=lambda params: family(params).answer(params["params"]),
        check=lambda params, answer: family(params).check(params["params"], answer),
        chat=lambda params, prompt, rng: _offered(params, [{"role": "user", "content": prompt}]),
        asked=lambda params: (params["family"], params["params"]),
    )


def families(ordinary: Mapping[str, Family]) -> tuple[Family, ...]:
    """The families with tools. ordinary: those that need none, by name."""
    return (
        Family("tool_call", _call_sample, _request_phrase, _calls_answer, _calls_check, _call_chat, _asked),
        Family("tool_calls", _two_sample, _request_phrase, _calls_answer, _calls_check, _call_chat, _asked),
        Family("tool_none", _none_sample, _request_phrase, _none_answer, _none_check, _call_chat, _asked),
        Family(
            "tool_result",
            _result_sample,
            _request_phrase,
            _result_answer,
            _result_check,
            _result_chat,
            _asked,
        ),
        _aside(ordinary),
    )
