"""How bench-peer accounts for processes, and what it makes of its turns."""

import pytest

from benchmarks.door.accounting import HAPROXY
from benchmarks.door.windows import CLIENT, ENGINE_PYTHON, FORWARD
from benchmarks.load import PROMPTS, Level, prompts_of
from benchmarks.peer import API_SERVER, ENGINE_CORE, WORKER, Turn, per_thousand, row_of, vllm_kind_of


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("/venv/bin/python3 /venv/bin/vllm serve /m --port 8124", API_SERVER),
        ("/venv/bin/python3 -c from multiprocessing.resource_tracker import main", API_SERVER),
        ("VLLM::EngineCore", ENGINE_CORE),
        ("VLLM::Worker", WORKER),
    ],
)
def test_each_process_of_vllm_has_a_kind(command: str, kind: str):
    assert vllm_kind_of(command) == kind


def level(tokens_per_s: float, num_requests: int = 50) -> Level:
    return Level(64, tokens_per_s, 100.0, 20.0, num_requests)


def test_cpu_is_for_1000_tokens_and_without_the_client():
    before = {HAPROXY: 1.0, CLIENT: 5.0}
    after = {HAPROXY: 1.32, CLIENT: 9.0, FORWARD: 6.4}
    # 50 requests of 64 tokens
    assert per_thousand(before, after, level(1.0)) == pytest.approx({HAPROXY: 100.0, FORWARD: 2000.0})


def test_a_row_has_the_median_turn_by_tokens_and_that_by_cpu():
    ours = [
        Turn(level(700.0), {HAPROXY: 50.0, ENGINE_PYTHON: 40.0, FORWARD: 2000.0}),
        Turn(level(800.0), {HAPROXY: 20.0, ENGINE_PYTHON: 30.0, FORWARD: 1800.0}),
        Turn(level(750.0), {HAPROXY: 30.0, ENGINE_PYTHON: 30.0, FORWARD: 1900.0}),
    ]
    theirs = [Turn(level(300.0), {API_SERVER: 90.0, ENGINE_CORE: 60.0, WORKER: 4000.0})] * 3
    row = row_of(64, {"triad": ours, "vllm": theirs})
    assert row["triad"]["tokens_per_s"] == 750.0
    assert row["triad"]["turns"] == [700.0, 800.0, 750.0]
    assert row["triad"]["cpu_ms_per_1000_tokens"] == {
        "beside forwards": 60.0,
        "turns": [90.0, 50.0, 60.0],
        "by kind": ours[2].cpu_ms,
    }
    assert row["vllm"]["cpu_ms_per_1000_tokens"]["beside forwards"] == 150.0
    assert (row["ratio"], row["cpu_ratio"], row["cpu_over_api_server"]) == (2.5, 0.4, 0.67)


def test_a_row_of_one_server_compares_nothing():
    row = row_of(1, {"triad": [Turn(level(70.0), {HAPROXY: 1.0})]})
    assert row.keys() == {"concurrency", "triad"}


def test_clients_go_round_the_prompts():
    asked = [prompt for client in range(len(PROMPTS)) for prompt in prompts_of(client, 3)]
    assert asked == [*PROMPTS] * 3
