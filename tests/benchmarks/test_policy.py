"""What bench-policy makes of a server's state and of its rows."""

import random
import time

import pytest

from benchmarks.policy import aims, report, rows
from benchmarks.policy.contenders import AUTO, FIXED, WORKLOADS, is_lossless, prompts, rotated
from benchmarks.policy.neighbour import neighbour
from benchmarks.policy.rows import Row
from benchmarks.policy.state import forecasts, num_shifts, parsed, tokens_by_mode

RUN = {"processor": "p", "cores": 2.0, "avx512": True, "commit": "c", "policy": "cost_model"}
RUN |= {"quality": "any", "triad": [], "workload": "mixed", "max_tokens": 9, "date": "2026-11-29"}


def row(contender: str, tokens_per_s: float, *, clients: int = 1, turn: int = 0, **more: object) -> Row:
    seconds = 5.0
    figures = (None, None, None, 3, 0, 0.1)
    part = str(more.pop("part", "levels"))
    tokens = round(tokens_per_s * seconds)
    return Row(part, contender, clients, turn, 2.0, seconds, tokens, tokens_per_s, *figures, run=RUN, **more)


def state(plan: str, made: dict[str, int], decisions: list[tuple[int, str, str, bool]]) -> dict[str, object]:
    """decisions: version, mode before, mode after, whether something changed."""
    return {
        "replicas": [
            {
                "load": {"decode": {"mode": plan, "block_length": 16}, "tokens_total_by_mode": made},
                "forecasts": [
                    {"decode": {"mode": "ar", "block_length": 1}, "tokens_per_s": 100.0 + len(decisions)},
                    {"decode": {"mode": "diffusion", "block_length": 16}, "tokens_per_s": 300.0},
                ],
            }
        ],
        "decisions": [
            {
                "plan": {"version": version, "decode": {"mode": after}},
                "load": {"decode": {"mode": before}},
                "changed": changed,
            }
            for version, before, after, changed in decisions
        ],
    }


def test_the_state_tells_of_forecasts_shifts_and_tokens():
    began = [(3, "ar", "diffusion", True)]
    later = [*began, (4, "diffusion", "ar", True), (5, "ar", "ar", True), (5, "ar", "ar", False)]
    states = [
        parsed(state("diffusion", {"ar": 10, "diffusion": 5}, began)),
        parsed(state("ar", {"ar": 50, "diffusion": 5, "self_speculation": 7}, later)),
    ]
    assert [one.plan for one in states] == ["diffusion 16", "ar"]
    assert forecasts(states) == {"ar": 102.5, "diffusion 16": 300.0}
    assert num_shifts(states) == 1  # version 3 was there before, version 5 changes only the rule
    assert tokens_by_mode(*states) == {"ar": 40, "self_speculation": 7}


def test_shares_are_of_the_best_fixed_setting_by_medians_over_turns():
    found = [row("ar", rate, turn=turn) for turn, rate in enumerate((100.0, 400.0, 110.0))]
    found += [row("diffusion 16", rate, turn=turn) for turn, rate in enumerate((200.0, 190.0, 210.0))]
    found += [row(AUTO, rate, turn=turn) for turn, rate in enumerate((150.0, 190.0, 900.0))]
    seen = aims.rates(found)
    assert aims.best_fixed(seen) == ("diffusion 16", 200.0)
    assert seen["diffusion 16"].spread == pytest.approx(0.1)
    assert aims.share_of_best(seen) == pytest.approx(0.95)
    assert aims.share_of_best(aims.rates(found[:6])) is None
    assert aims.share_of_best(aims.rates(found[6:])) is None


def test_forecasts_are_read_while_auto_runs_and_compared_with_what_was_made():
    pinned = {"ar": 1.0, "diffusion 16": 2.0}  # what is foretold while a mode is pinned is not asked for
    found = [row("ar", 100.0, forecasts=pinned), row("diffusion 16", 200.0, forecasts=pinned)]
    found += [row(AUTO, 190.0, turn=turn, forecasts={"ar": 50.0 * turn}) for turn in (1, 2, 3)]
    assert aims.foretold_over_made(found) == {"ar": pytest.approx(1.0)}


@pytest.mark.parametrize("seed", range(20))
def test_no_single_setting_exceeds_the_best_of_each_step(seed: int):
    draw = random.Random(seed)
    names = (AUTO, "ar", "diffusion 8", "diffusion 32")
    found = [
        row(name, draw.uniform(50.0, 500.0), turn=turn, part="ramp", label=str(step))
        for name in names
        for turn in range(3)
        for step in range(5)
    ]
    seen = aims.wave(found)
    assert seen is not None
    single = max(tokens for name, tokens in seen.tokens.items() if name != AUTO)
    assert seen.foreknown >= single
    assert seen.room == pytest.approx(seen.foreknown / single)
    assert seen.share == pytest.approx(seen.tokens[AUTO] / seen.foreknown)
    assert aims.wave([one for one in found if one.contender != AUTO]) is None
    assert aims.wave([one for one in found if one.contender == AUTO]) is None


def test_trials_are_tokens_of_modes_that_no_plan_has():
    found = [
        row(AUTO, 100.0, plans=["diffusion 16"], tokens_by_mode={"diffusion": 98, "ar": 2}, num_shifts=1),
        row(AUTO, 100.0, plans=["ar", "diffusion 8"], tokens_by_mode={"diffusion": 60, "ar": 40}),
    ]
    assert aims.share_of_trials(found) == pytest.approx(0.01)
    assert aims.shifts_per_minute(found) == pytest.approx(12.0)


def rows_of_all_parts(auto: float) -> list[Row]:
    found = []
    for level in (1, 64):
        for name, rate in (("ar", 100.0), ("diffusion 16", 200.0), (AUTO, auto)):
            foretold = {"ar": 100.0, "diffusion 16": auto}
            found.append(row(name, rate, clients=level, forecasts=foretold))
            for part, label in (("ramp", str(level)), ("square", str(level)), ("start", "")):
                if (part, name) != ("start", AUTO):
                    found.append(row(name, rate, clients=level, part=part, label=label))
            for label in ("cycle", "after"):
                found.append(row(name, rate, clients=level, part="neighbour", label=label))
        for second in range(15):
            found.append(row(AUTO, auto, clients=level, part="start", label=f"second {second}"))
        made = {"diffusion": 80, "ar": 0 if auto > 190.0 else 20}
        shifts = 0 if auto > 190.0 else 1
        steady = {"plans": ["diffusion 16"], "tokens_by_mode": made, "num_shifts": shifts}
        found.append(row(AUTO, auto, clients=level, part="steady", **steady))
    return found


@pytest.mark.parametrize("auto", [198.0, 100.0])
def test_the_report_says_of_each_aim_whether_it_is_met(auto: float, tmp_path):
    raw = tmp_path / "raw.jsonl"
    found = rows_of_all_parts(auto)
    for one in found:
        rows.append(raw, one)
    assert rows.read(raw) == found
    text = report.write_report(raw)
    assert raw.with_suffix(".md").read_text() == text
    verdicts = [line for line in text.splitlines() if line.startswith("- ")]
    wanted = "- met" if auto == 198.0 else "- **not met**"
    assert len(verdicts) == 14
    assert [line for line in verdicts if not line.startswith(wanted)] == []
    assert {path.name.rpartition("-")[2] for path in tmp_path.glob("*.png")} == {
        "levels.png",
        "ramp.png",
        "square.png",
    }


def test_rows_of_another_form_are_refused(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"part": "levels", "where": "replica"}\n')
    with pytest.raises(ValueError, match="where"):
        rows.read(raw)


def test_every_contender_comes_first_once():
    names = ("a", "b", "c")
    assert {rotated(names, turn)[0] for turn in range(3)} == set(names)
    assert all(sorted(rotated(names, turn)) == sorted(names) for turn in range(7))


def test_lossless_settings_are_those_of_ar_and_self_speculation():
    assert {name.split()[0] for name in FIXED if is_lossless(name)} == {"ar", "self_speculation"}
    assert not is_lossless(AUTO)


def test_each_workload_has_prompts_and_the_mixed_one_others_too():
    known, mixed = set(prompts("held-out")), prompts("mixed")
    assert all(prompts(workload) for workload in WORKLOADS)
    assert [prompt in known for prompt in mixed[:6]] == [True, False] * 3


def test_a_neighbour_ends_by_itself_and_where_it_is_left():
    with neighbour(0.0) as process:
        assert process.wait(timeout=30.0) == 0
    began_s = time.monotonic()
    with neighbour(600.0) as process:
        assert process.poll() is None
    assert process.returncode is not None
    assert time.monotonic() - began_s < 60.0
