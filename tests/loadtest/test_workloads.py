import random

import pytest

from loadtest.arrivals import Arrival, TraceError
from loadtest.workloads import (
    HIGH_ACCEPTANCE,
    LOW_ACCEPTANCE,
    MIDDLE_ACCEPTANCE,
    WORKLOADS,
    find_workload,
    pool,
    verified,
)
from training.tasks.family import draw, is_held_out
from training.tasks.registry import FAMILIES, held_out_tasks

NOW = Arrival(0.0)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_asks_the_same_for_the_same_seed(name: str) -> None:
    workload = WORKLOADS[name]
    first, second = ([workload.draw(random.Random(3), NOW) for _ in range(2)] for _ in range(2))
    assert [ask.messages for ask in first] == [ask.messages for ask in second]
    ask = first[0]
    assert ask.class_name in workload.slos or name == "trace"
    body = ask.body("m", {"decoding": {"mode": "ar"}})
    assert body["temperature"] == 0
    assert body["decoding"] == {"mode": "ar"}
    assert ("ignore_eos" in body) == (ask.output_len is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_checked(family: str) -> None:
    """The reference answer of the very prompt passes, another's does not, and no prompt was trained on."""
    answers = {t.prompt: t for t in held_out_tasks(family, 3)}
    assert all(is_held_out(family, t.params) for t in answers.values())
    ask = find_workload(f"tasks:{family}").draw(random.Random(5), NOW)
    assert ask.check is not None
    assert not ask.check("nonsense")
    rng = random.Random(5)
    assert rng.choice((family,)) == family  # the draw's own first step, so that the task is the same
    task = draw(FAMILIES[family], rng, held_out=True)
    assert ask.messages[0]["content"] == task.prompt
    assert ask.check(task.answer)


def test_categories_by_acceptance_share_out_the_families() -> None:
    assert sorted(HIGH_ACCEPTANCE + MIDDLE_ACCEPTANCE + LOW_ACCEPTANCE) == sorted(FAMILIES)


def test_a_trace_sets_lengths_and_class() -> None:
    ask = find_workload("long_answer").draw(random.Random(0), Arrival(0.0, 40, 7, "gold"))
    assert len(ask.messages[0]["content"].split()) == 37
    assert (ask.output_len, ask.class_name) == (7, "gold")
    for class_name in find_workload("mixed").slos:
        ask = find_workload("mixed").draw(random.Random(0), Arrival(0.0, 40, 7, class_name))
        assert (ask.output_len, ask.class_name) == (7, class_name)


@pytest.mark.parametrize(
    ("name", "arrival", "problem"),
    [
        ("tasks", Arrival(0.0, prompt_len=9), "lengths, which tasks does not take; these do: long_prompt"),
        ("tasks:json", Arrival(0.0, output_len=9), "lengths, which tasks:json does not take"),
        ("shared_prefix", Arrival(0.0, class_name="gold"), "classes gold; shared_prefix knows none"),
        (
            "mixed",
            Arrival(0.0, class_name="gold"),
            "knows interactive, batch, long_prompt, `trace` takes any",
        ),
    ],
)
def test_a_trace_is_never_half_used(name: str, arrival: Arrival, problem: str) -> None:
    with pytest.raises(TraceError, match=problem):
        find_workload(name).check_trace([Arrival(0.0), arrival])
    find_workload(name).check_trace([Arrival(0.0)])
    find_workload("trace").check_trace([arrival])


def test_chats_share_their_prefixes() -> None:
    rng = random.Random(0)
    asks = [find_workload("shared_prefix").draw(rng, NOW) for _ in range(60)]
    assert len({ask.messages[0]["content"] for ask in asks}) == 8
    assert len({ask.messages[1]["content"] for ask in asks}) > 50


def test_mixed_traffic_has_all_its_classes() -> None:
    rng = random.Random(0)
    workload = find_workload("mixed")
    assert {workload.draw(rng, NOW).class_name for _ in range(60)} == set(workload.slos)


def test_a_verified_workload_asks_only_what_it_knows_the_text_of() -> None:
    asks = pool(find_workload("tasks"), 3, seed=1)
    workload = verified(find_workload("tasks"), asks, ["a", "b", "c"])
    expected = {ask.messages[0]["content"]: text for ask, text in zip(asks, "abc", strict=True)}
    rng = random.Random(0)
    for _ in range(20):
        ask = workload.draw(rng, NOW)
        assert ask.expected == expected[ask.messages[0]["content"]]


def test_an_unknown_workload_lists_the_known() -> None:
    with pytest.raises(ValueError, match="the workloads are: tasks, high_acceptance"):
        find_workload("poems")
    with pytest.raises(ValueError, match="the families are: json, sql"):
        find_workload("tasks:poems")
