import json

import pytest

from loadtest.simulator.__main__ import PAGE, SCENARIO_PAGE, main
from loadtest.simulator.capacity import carried, crossover_lines, modes_lines, winners
from loadtest.simulator.load import Mix
from loadtest.simulator.page import check_places, update
from loadtest.simulator.scenarios import PLANS, SCENARIOS, Machine, Slo, fixed, load_outcomes
from loadtest.simulator.tables import summary_lines
from policies.modes import Mode
from tests.loadtest.simulator.test_cost import rows

MACHINE = Machine.b200("8b")


def test_run_says_what_came_of_it_and_that_it_is_simulated(capsys):
    assert main(["run", "--replicas", "2", "--requests", "300", "--policy", "self_speculation"]) == 0
    printed = capsys.readouterr()
    assert "Simulated." in printed.err
    found = dict(line.split(maxsplit=1) for line in printed.out.splitlines())
    assert found["num_finished"] == "300"
    assert float(found["tokens_per_s"]) > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--model", "3b"], "8b and 14b"),
        (["run", "--policy", "nope"], "unknown policy"),
        (["run", "--rate", "0"], "rate must be above 0"),
        (["run", "--replicas", "0"], "at least 1"),
        (["run", "--params", "{"], "Expecting"),
        (["run", "--costs", "missing.json"], "No such file"),
        (["scenarios", "--only", "nothing like it"], "no scenario"),
        (["scenarios", "--policies", "ar", "nope"], "no policy nope; there are ar,"),
        (["validate", "missing.json"], "No such file"),
    ],
)
def test_what_is_wrong_is_said(capsys, arguments, complaint):
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_scenarios_print_tables_and_write_lines(capsys, tmp_path):
    path = tmp_path / "out.jsonl"
    few = ["--least", "100", "--most", "100", "--only", "1 replica, quiet", "--json", str(path)]
    assert main(["scenarios", *few]) == 0
    printed = capsys.readouterr().out
    assert "| ar" in printed
    assert "| oracle" in printed
    outcomes = [json.loads(line) for line in path.read_text().splitlines()]
    assert {outcome["num_requests"] for outcome in outcomes} == {100}
    summary = list(summary_lines(load_outcomes([path])))
    assert len(summary) == 3
    assert summary[2].startswith("| 1 replica, quiet | 100 |")


def test_scenarios_of_some_policies_are_those_of_all(capsys, tmp_path):
    def outcomes(*options):
        path = tmp_path / "-".join(("out", *options))
        few = ["--least", "60", "--most", "60", "--only", "1 replica, quiet", "--json", str(path)]
        assert main(["scenarios", *few, *options]) == 0
        return {outcome.policy: outcome for outcome in load_outcomes([path])}

    every, some = outcomes(), outcomes("--policies", "cost_model", "ar")
    assert some.keys() == {"ar", "cost_model"}
    assert all(every[policy] == outcome for policy, outcome in some.items())


def test_outcomes_of_another_time_are_refused(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text('{"scenario": "s", "policy": "ar", "speed": 3}\n')
    with pytest.raises(ValueError, match="make them anew"):
        load_outcomes([path])


@pytest.mark.parametrize("request_row", [[8, 8, 10, 9], [8, 8, 10, 9, 9]])
def test_validation_recovers_a_machine_that_is_as_its_table_says(capsys, tmp_path, request_row):
    """One request of 10 tokens after a prompt of 8, in ar: a prefill and 9 steps, at the table's prices."""
    table = {
        "rows": rows(counts=(1, 2)),
        "measured": [
            {
                "concurrency": 1,
                "mode": "ar",
                "block_length": 1,
                "tokens_per_s": 10 / (0.0053 + 9 * 0.00513),
                "turns": [1.0, 1.1],
                "requests": [request_row] * 3,
            }
        ],
    }
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    assert main(["validate", str(path)]) == 0
    assert "1 of 1 cells within 15 %; mean error 0." in capsys.readouterr().out
    path.write_text(json.dumps({"rows": table["rows"]}))
    assert main(["validate", str(path)]) == 2


def test_the_modes_table_has_one_winner_a_column():
    lines = list(modes_lines(MACHINE))
    assert len(lines) == 2 + len(PLANS)
    columns = list(zip(*(line.split("|")[2:-1] for line in lines[2:]), strict=True))
    assert all(sum("**" in cell for cell in column) == 1 for column in columns)


def test_with_poor_acceptance_ar_wins_under_load_and_with_good_never():
    assert winners(MACHINE, 1.5, [128])[0][0].mode is Mode.AR
    assert winners(MACHINE, 10.0, [1])[0][0].mode is Mode.SELF_SPECULATION
    assert len(list(crossover_lines(MACHINE))) > 2


def test_a_tighter_pace_carries_less():
    loose = carried(MACHINE, fixed(PLANS[0]), Slo(1.0, 0.05), Mix(), 800, 60.0)
    tight = carried(MACHINE, fixed(PLANS[0]), Slo(1.0, 0.01), Mix(), 800, 60.0)
    assert 0 < tight.rate < loose.rate < 60.0
    assert loose.outcome.good_share >= 0.99


def test_a_page_takes_new_tables_and_keeps_its_text(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- begin a -->\nold\n<!-- end a -->\nAfter.\n")
    update(page, "a", ["| new |", ""])
    assert page.read_text() == "Before.\n<!-- begin a -->\n| new |\n<!-- end a -->\nAfter.\n"
    with pytest.raises(ValueError, match="no <!-- begin b -->"):
        update(page, "b", [])
    with pytest.raises(ValueError, match="not for a, b"):
        check_places(page, ["b", "a"])


def test_the_capacity_page_has_a_place_for_every_table():
    text = SCENARIO_PAGE.read_text()
    for number in range(1, len(SCENARIOS) + 1):
        assert f"<!-- begin scenario-{number} -->" in text
    assert f"<!-- begin scenario-{len(SCENARIOS) + 1} -->" not in text
    assert "simulated" in text
    assert "<!-- begin summary -->" in PAGE.read_text()
