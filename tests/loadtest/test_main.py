"""The whole of it against a small server: records in, report out, and an exit status to gate a release by."""

import json
import re
from pathlib import Path

import pytest

from loadtest import compare
from loadtest.__main__ import main
from loadtest.arrivals import Arrival, write_trace
from loadtest.client import KEY_VARIABLE
from loadtest.records import read_records
from tests.loadtest.openai_server import OpenAiServer

BRIEF = ("--seconds", "0.5", "--pause", "0", "--workload", "long_answer")
QUICK = ("--rates", "20", "40", *BRIEF)
ONE_LEVEL = ("--rates", "40", *BRIEF)
TIMELINE = ("--timeline", "spike:low=10,high=60,duration_s=0.9")


def test_a_run_writes_a_report_that_needs_nothing_else(openai_server: OpenAiServer, tmp_path: Path) -> None:
    status = main(
        ["--url", openai_server.url, "--out", str(tmp_path), *QUICK, *TIMELINE, "--gate", "errors<=0"]
    )
    assert status == 0
    page = (tmp_path / "report.html").read_text()
    pictures = re.findall(r"<img alt='[^']+' src='(data:image/png;base64,)[A-Za-z0-9+/=]{5000,}'>", page)
    assert len(pictures) == len(list(tmp_path.glob("*.png"))) == 5
    overview = [line.split(" | ") for line in (tmp_path / "overview.md").read_text().splitlines()]
    assert overview[0][:3] == ["| E2E p50 / p95, ms", "20/s", "40/s"]
    assert [line[0] for line in overview[2:]] == [
        f"| `{name}`" for name in ("auto", "ar", "self_speculation", "diffusion")
    ]
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)  # in which any four letters come now and then
    assert "http" not in text.replace(openai_server.url, "")
    records = list(read_records(tmp_path / "records.jsonl"))
    rows = json.loads((tmp_path / "summary.json").read_text())
    settings = {"auto", "ar", "self_speculation", "diffusion"}
    assert {(row["setting"], row["stage"]) for row in rows} == {
        *((setting, stage) for setting in settings for stage in ("20/s", "40/s")),
        ("auto", "timeline"),
    }
    assert sum(row["summary"]["num_requests"] for row in rows) == len(records)
    assert len((tmp_path / "summary.txt").read_text().splitlines()) == 1 + len(rows) + 2
    by_stage: dict[str, set[int]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], set()).add(row["summary"]["num_requests"])
    assert all(len(counts) == 1 for counts in by_stage.values())  # all settings had the same arrivals


def test_a_broken_gate_is_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = OpenAiServer(fault_of_all="503")
    with server.running_on_loopback() as url:
        options = ["--url", url, "--out", str(tmp_path), *QUICK, "--settings", "auto", "--timeline", "none"]
        assert main(options) == 1
        assert "GATE BROKEN: auto at 20/s: errors is 1, wanted <= 0.01" in capsys.readouterr().err
        assert "Gates broken" in (tmp_path / "report.html").read_text()
        assert main([*options, "--gate-up-to", "10"]) == 0


def test_a_trace_and_users_are_loads_too(openai_server: OpenAiServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    write_trace([Arrival(0.0, 12, 5, "gold"), Arrival(0.2, 30, 9, "tin")], trace)
    common = ["--url", openai_server.url, "--settings", "auto", "--timeline", "none"]
    slos = ["--slo", "e2e=60", "gold:ttft=0.000001"]
    assert main([*common, *slos, "--out", str(tmp_path / "a"), "--trace", str(trace)]) == 0
    assert [body["max_tokens"] for body in openai_server.bodies[-2:]] == [5, 9]
    (row,) = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert row["summary"]["attained"] == 0.5  # gold misses its own SLO, tin meets that of all
    assert "gold: TTFT 0.001 ms; tin: E2E 60000 ms" in (tmp_path / "a" / "report.html").read_text()
    users = ["--workload", "long_answer", "--rates", "--users", "2", "3", "--seconds", "0.3", "--pause", "0"]
    assert main([*common, "--out", str(tmp_path / "b"), *users]) == 0
    assert openai_server.peak == 3
    assert {r.stage for r in read_records(tmp_path / "b" / "records.jsonl")} == {"2 users", "3 users"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--gate", "speed>=1"), "write figure<=number"),
        (("--workload", "poems"), "the workloads are"),
        (("--settings", "fast"), "'fast' is no mode: auto, lossless"),
        (("--timeline", "sine:duration_s=1"), "the shapes are"),
        (("--slo", "ttft=fast"), "write seconds of ttft"),
        (("--rates",), "there is no load"),
        (("--trace", "/nowhere.jsonl"), "/nowhere.jsonl"),
        (("--pause", "-1"), "--pause must be 0 or more seconds, not -1"),
        (("--burstiness", "0"), "burstiness must be above 0"),
        (("--verify", "2"), "--verify needs settings whose text is fixed"),
        (("--url", "http://127.0.0.1:9"), "/v1/models does not answer"),
    ],
)
def test_a_wrong_option_says_what_to_change(
    options: tuple[str, ...], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--out", str(tmp_path), *options]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("way", ["option", "option=", "environment"])
def test_the_key_is_shown_on_whatever_is_asked_for(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = OpenAiServer(api_key="sk-secret")
    given = {"option": ["--api-key", "sk-secret"], "option=": ["--api-key=sk-secret"], "environment": []}[way]
    if way == "environment":
        monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    load = [*ONE_LEVEL, "--settings", "auto", "ar", "--timeline", "none", "--gate", "errors<=0"]
    options = ["--out", str(tmp_path), *load, *given]
    with server.running_on_loopback() as url:
        assert main(["--url", url, *options]) == 0
    assert server.refused == []
    assert server.num_states > 0
    assert not any("sk-secret" in path.read_text(errors="replace") for path in tmp_path.iterdir())


def test_a_server_that_wants_a_key_is_told_apart_from_one_that_is_no_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with OpenAiServer(api_key="sk-secret").running_on_loopback() as url:
        assert main(["--url", url, "--out", str(tmp_path), *QUICK]) == 2
    assert (
        f"answers 401: give the server's API key, by {KEY_VARIABLE} or an option" in capsys.readouterr().err
    )


def test_texts_are_verified_against_those_of_a_request_alone(tmp_path: Path) -> None:
    server = OpenAiServer(alters_after=4)
    options = ["--settings", "ar", "--timeline", "none", "--verify", "2", "--gate", "errors<=0", *ONE_LEVEL]
    with server.running_on_loopback() as url:
        assert main(["--url", url, "--out", str(tmp_path), *options]) == 1
    kinds = {r.error for r in read_records(tmp_path / "records.jsonl")}
    assert "wrong_text" in kinds


def test_two_servers_side_by_side(
    openai_server: OpenAiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = OpenAiServer(gap_s=0.05)
    with slow.running_on_loopback() as url:
        arguments = [
            openai_server.url,
            f"{url}/v1",
            "--users",
            "2",
            "--seconds",
            "0.4",
            "--out",
            str(tmp_path),
        ]
        assert compare.main([*arguments, "--turns", "2", "--name-b", "slow"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    rate = next(line for line in table if "tok/s" in line)
    assert float(rate[-1]) > 2  # 5 ms between chunks against 50
    latency = next(line for line in table if line[2:5] == ["E2E", "p50", "ms"])
    assert float(latency[-1]) < 0.5
    records = list(read_records(tmp_path / "records.jsonl"))
    begun = {(r.turn, r.setting): r.intended_s for r in reversed(records)}
    assert begun[0, "A"] < begun[0, "slow"] < begun[1, "slow"] < begun[1, "A"]
    assert (tmp_path / "comparison.md").read_text().count("\n") == 2 + 9


def test_each_of_two_servers_gets_its_own_key_and_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = OpenAiServer(api_key="sk-a"), OpenAiServer(api_key="sk-b")
    monkeypatch.setenv(f"{KEY_VARIABLE}_B", "sk-b")
    options = ["--users", "1", "--seconds", "0.2", "--turns", "1", "--api-key-a", "sk-a"]
    with a.running_on_loopback() as url_a, b.running_on_loopback() as url_b:
        assert compare.main([url_a, url_b, *options, "--out", str(tmp_path)]) == 0
    assert a.bodies
    assert b.bodies
    assert (a.refused, b.refused) == ([], [])
    assert {r.error for r in read_records(tmp_path / "records.jsonl")} == {None}


def test_comparing_needs_two_servers(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["http://127.0.0.1:9", "http://127.0.0.1:9", "--name-b", "A"]) == 2
    assert "must differ" in capsys.readouterr().err
    assert compare.main(["http://127.0.0.1:9", "http://127.0.0.1:9"]) == 2
    assert "does not answer" in capsys.readouterr().err
