"""Families: reference answers pass their checkers, corrupted ones fail; the split keeps tasks apart."""

import hashlib
import json
import random

import jsonschema
import pytest

from training.tasks import drills, tools
from training.tasks.family import HELD_OUT_ONE_IN, draw, is_held_out
from training.tasks.registry import ALL_FAMILIES, FAMILIES, TOOL_FAMILIES, held_out_tasks, train_chat

NUM_TASKS = 60


def key(family, params):
    return json.dumps([family, params], sort_keys=True)


def test_there_are_ten_families_or_more():
    assert len(FAMILIES) >= 10


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_reference_answers_pass(name):
    rng = random.Random(f"pass/{name}")
    for _ in range(NUM_TASKS):
        task = draw(ALL_FAMILIES[name], rng, held_out=False)
        assert ALL_FAMILIES[name].check(task.params, task.answer), task
        assert task.prompt.isascii()
        assert task.answer == task.answer.strip()


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_corrupted_answers_fail(name):
    """A changed, dropped or doubled word or digit, another task's answer, and nothing at all."""
    rng = random.Random(f"fail/{name}")
    family = ALL_FAMILIES[name]
    for _ in range(NUM_TASKS):
        task = draw(family, rng, held_out=False)
        other = draw(family, rng, held_out=False)
        assert not family.check(task.params, "")
        assert not family.check(task.params, "I do not know.")
        if other.answer != task.answer:
            assert not family.check(task.params, other.answer)
        places = [i for i, character in enumerate(task.answer) if character.isalnum()]
        place = rng.choice(places)
        was = task.answer[place]
        new = rng.choice([c for c in ("3456789" if was.isdigit() else "qvwz") if c != was.lower()])
        corrupted = task.answer[:place] + new + task.answer[place + 1 :]
        assert not family.check(task.params, corrupted), corrupted
        assert not family.check(task.params, task.answer[: rng.randrange(1, len(task.answer) - 2)])


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_parameters_alone_make_the_answer(name):
    """The parameters survive JSON, and no random state hides in the answer."""
    rng = random.Random(f"params/{name}")
    for _ in range(20):
        task = draw(ALL_FAMILIES[name], rng, held_out=True)
        assert ALL_FAMILIES[name].is_held_out(task.params)
        again = json.loads(json.dumps(task.params))
        assert again == task.params
        assert ALL_FAMILIES[name].answer(again) == task.answer


def test_layout_does_not_matter_to_parsing_checkers():
    rng = random.Random(0)
    task = draw(FAMILIES["json"], rng, held_out=False)
    assert FAMILIES["json"].check(task.params, json.dumps(json.loads(task.answer), indent=4))
    task = draw(FAMILIES["sql"], rng, held_out=False)
    assert FAMILIES["sql"].check(task.params, task.answer.replace("\n", " "))


@pytest.mark.parametrize(
    "answer",
    [
        "import os\ndef {name}(x):\n    return x",
        "def {name}(x):\n    return ().__class__",
        "def {name}(x):\n    return open('/etc/passwd')",
        "def {name}(x):\n    return __import__('os')",
        "def {name}(x=1 + 1):\n    return y",
    ],
)
def test_code_that_is_not_plain_arithmetic_is_not_run(answer):
    params = {"name": "fix_price", "steps": [["add", 0]]}
    assert not FAMILIES["python"].check(params, answer.format(name=params["name"]))


def test_no_held_out_task_is_in_training():
    held_out = {key(name, t.params) for name in ALL_FAMILIES for t in held_out_tasks(name, 40)}
    prompts = {t.prompt for name in ALL_FAMILIES for t in held_out_tasks(name, 40)}
    assert len(held_out) > 18 * 38
    rng = random.Random(1)
    for _ in range(6000):
        chat = train_chat(
            rng, {}, two_turn_share=0.2, system_share=0.2, talk_share=0.0, drill_share=0.0, tool_share=0.5
        )
        for message in chat.messages:
            assert message["content"] not in prompts


def test_the_split_is_stable_and_of_the_wanted_size():
    rng = random.Random(2)
    draws = [FAMILIES["add"].sample(rng) for _ in range(4000)]
    share = sum(is_held_out("add", params) for params in draws) / len(draws)
    assert share == pytest.approx(1 / HELD_OUT_ONE_IN, rel=0.3)
    first = [t.prompt for t in held_out_tasks("story", 5)]
    assert first == [t.prompt for t in held_out_tasks("story", 5)]
    assert len(set(first)) == 5


def test_drills_answer_from_the_request():
    rng = random.Random(4)
    for _ in range(300):
        request, answer = drills.repeat(rng)
        assert answer.replace("->", " ").replace("-", " ").replace(",", " ").split() == [
            w for w in request.partition(": ")[2].replace(",", " ").split() if w != "and"
        ]
        request, answer = drills.look_up(rng)
        key, value = answer.removeprefix("The ").split(" is ")
        assert request.endswith(f"Give me the {key}.")
        assert value in request


def test_shares_steer_the_draw():
    rng = random.Random(3)
    only = dict.fromkeys(FAMILIES, 0.0) | {"add": 1.0}
    for _ in range(20):
        chat = train_chat(rng, only, two_turn_share=0.0, system_share=0.0, talk_share=0.0)
        assert [m["role"] for m in chat.messages] == ["user", "assistant"]
        assert "carry" in chat.messages[1]["content"]


def test_chats_with_tools_show_which_function_is_meant():
    """The names of function and arguments stand in the list alone, the values in the request."""
    rng = random.Random(5)
    for _ in range(300):
        task = draw(TOOL_FAMILIES["tool_call"], rng, held_out=False)
        (called,) = tools.read_calls(task.answer)
        offered = {each["function"]["name"]: each["function"]["parameters"] for each in task.chat.tools}
        assert len(offered) == len(task.chat.tools)
        jsonschema.validate(called["arguments"], offered[called["name"]])
        order = [name for name in offered[called["name"]]["properties"] if name in called["arguments"]]
        assert list(called["arguments"]) == order
        for value in called["arguments"].values():
            assert str(value) in task.prompt


def test_results_are_said_with_their_values():
    rng = random.Random(6)
    for _ in range(300):
        task = draw(TOOL_FAMILIES["tool_result"], rng, held_out=False)
        results = [m["content"] for m in task.chat.messages if m["role"] == "tool"]
        assert results
        for result in results:
            said = json.loads(result) if result.startswith("{") else {"result": result}
            assert all(f"{name} is {value}" in task.answer for name, value in said.items())


def test_where_no_function_fits_none_that_does_is_offered():
    rng = random.Random(7)
    for _ in range(300):
        task = draw(TOOL_FAMILIES["tool_none"], rng, held_out=False)
        (missing,) = task.params["missing"]
        assert missing["name"] not in [each["function"]["name"] for each in task.chat.tools]
        assert task.answer == tools.NO_TOOL


def test_without_tools_the_draws_are_as_they_were():
    """The tokenizer is trained on them, and its ids are the shipped weights'."""
    rng = random.Random("tokenizer/0")
    chats = [train_chat(rng, {}, two_turn_share=0.0, system_share=0.0, talk_share=0.05) for _ in range(50)]
    digest = hashlib.sha256(json.dumps([chat.messages for chat in chats]).encode()).hexdigest()
    assert digest == "41a4551f233fd925d08dc8dc66549c98a4309656a1bc2b438e8cef4bc076ed35"
