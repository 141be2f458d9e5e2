"""locust itself, headless, against a real server on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.client import KEY_VARIABLE
from loadtest.records import ErrorKind, read_records
from loadtest.report import main as report
from tests.loadtest.openai_server import OpenAiServer

ROOT = Path(__file__).parents[2]
LOCUST = [
    sys.executable,
    "-m",
    "locust",
    "-f",
    "loadtest/locustfile.py",
    "--headless",
    "--loglevel",
    "WARNING",
]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LOCUST, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_headless_users_measure_each_latency(openai_server: OpenAiServer, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    done = run(
        *("--host", openai_server.url, "--users", "4", "--spawn-rate", "50", "--run-time", "2s"),
        *("--workload", "long_answer", "--decoding", "ar", "--records", str(out)),
        *("--json", "--stop-timeout", "10"),
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    records = list(read_records(out))
    assert len(records) == len(openai_server.bodies) > 8
    assert {r.error for r in records} == {None}
    assert openai_server.peak <= 4
    for name in ("TTFT", "TPOT", "E2E"):
        assert rows[name]["num_requests"] == len(records)
    assert rows["inter-chunk"]["num_requests"] == sum(len(r.chunks) - 1 for r in records)
    assert rows["TTFT"]["total_response_time"] < rows["E2E"]["total_response_time"]
    assert all(body["decoding"] == {"mode": "ar"} for body in openai_server.bodies)
    assert report([str(out), "--out", str(tmp_path / "report"), "--gate", "errors<=0"]) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("way", ["option", "environment"])
def test_the_key_is_shown_on_whatever_is_asked_for(way: str, tmp_path: Path) -> None:
    server = OpenAiServer(api_key="sk-secret")
    out = tmp_path / "records.jsonl"
    options = ["--users", "2", "--spawn-rate", "50", "--run-time", "1s", "--workload", "long_answer"]
    with server.running_on_loopback() as url:
        options += ["--host", url, "--records", str(out), "--stop-timeout", "10"]
        if way == "option":
            done = run(*options, "--api-key", "sk-secret")
        else:
            done = run(*options, **{KEY_VARIABLE: "sk-secret"})
    assert done.returncode == 0, done.stderr
    assert server.refused == []
    assert {r.error for r in read_records(out)} == {None}
    assert "sk-secret" not in done.stdout + done.stderr + out.read_text()


def test_without_its_key_a_server_refuses_before_any_user_is_there() -> None:
    server = OpenAiServer(api_key="sk-secret")
    with server.running_on_loopback() as url:
        done = run("--host", url, "--users", "2", "--run-time", "1s", **{KEY_VARIABLE: ""})
    assert done.returncode != 0
    assert "give the server's API key, by TRIAD_API_KEY or an option" in done.stderr + done.stdout
    assert server.refused == ["/v1/models"]


def test_a_shape_drives_the_users_and_workers_send_their_records(
    openai_server: OpenAiServer, tmp_path: Path
) -> None:
    out = tmp_path / "records.jsonl"
    done = run(
        *("--host", openai_server.url, "--processes", "2", "--shape", "steps:levels=2/6,duration_s=6"),
        *("--workload", "long_answer", "--records", str(out), "--stop-timeout", "10"),
    )
    assert done.returncode == 0, done.stderr
    records = list(read_records(out))
    assert len(records) == len(openai_server.bodies) > 10
    assert {r.error for r in records} == {None}
    assert 2 < openai_server.peak <= 6


def test_failures_have_their_kind_and_fail_the_run(tmp_path: Path) -> None:
    server = OpenAiServer(fault_of_all="truncated")
    out = tmp_path / "records.jsonl"
    with server.running_on_loopback() as url:
        done = run(
            *("--host", url, "--users", "2", "--spawn-rate", "50", "--run-time", "1s"),
            *("--workload", "long_answer", "--records", str(out)),
        )
    assert done.returncode == 1
    assert "RequestFailed('truncated_stream')" in done.stdout + done.stderr
    assert {r.error for r in read_records(out)} == {ErrorKind.TRUNCATED}


def test_a_pace_counts_from_when_a_request_was_due(tmp_path: Path) -> None:
    """One user, due 20 times a second, at a server that takes 0.2 s: each next request waits longer."""
    server = OpenAiServer(gap_s=0.05)
    out = tmp_path / "records.jsonl"
    with server.running_on_loopback() as url:
        run(
            *("--host", url, "--users", "1", "--run-time", "2s", "--pace", "20"),
            *("--workload", "long_answer", "--records", str(out)),
        )
    waits = [r.sent_s - r.intended_s for r in read_records(out) if r.sent_s is not None]
    assert len(waits) > 3
    assert waits == sorted(waits)
    assert waits[-1] > 0.3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--workload", "poems"), "no workload 'poems'; the workloads are: tasks"),
        (("--shape", "sine:duration_s=3"), "no shape 'sine'"),
        (("--verify", "3"), "--verify needs a --decoding whose text is fixed"),
    ],
)
def test_a_wrong_option_says_what_to_change(arguments: tuple[str, ...], problem: str) -> None:
    done = run("--host", "http://127.0.0.1:9", "--users", "1", "--run-time", "1s", *arguments)
    assert done.returncode != 0
    assert problem in done.stderr + done.stdout
