"""`python -m loadtest` whole against a real Triad: what it writes, and its status that gates releases."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.records import read_records
from tests.e2e.host import Host

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def loadtest(server: Host, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "loadtest",
        "--url",
        server.url,
        "--out",
        str(out),
        "--pause",
        "0.2",
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_a_whole_report_of_a_load_that_keeps_its_gates(server: Host, tmp_path: Path) -> None:
    done = loadtest(
        *(server, tmp_path, "--rates", "2", "6", "--seconds", "2", "--settings", "auto", "ar", "diffusion"),
        *("--timeline", "spike:low=2,high=12,duration_s=6", "--gate", "errors<=0,correct>=0.6"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = list(read_records(tmp_path / "records.jsonl"))
    assert {r.error for r in records} == {None}
    assert {r.stage for r in records} == {"2/s", "6/s", "timeline"}
    for record in records:
        assert record.chunks
        assert record.output_tokens is not None
        assert record.decoding is not None
        modes = record.decoding["tokens"]
        assert sum(modes.values()) == record.output_tokens
        if record.setting != "auto":
            assert set(modes) == {record.setting}
        assert record.intended_s <= record.chunks[0].at_s <= record.chunks[-1].at_s <= (record.end_s or 0)
    rows = json.loads((tmp_path / "summary.json").read_text())
    forwards = {row["setting"]: row["summary"]["tokens_per_forward"] for row in rows if row["stage"] == "6/s"}
    assert forwards["ar"] == 1.0
    assert forwards["diffusion"] > 1.5
    observed = json.loads((tmp_path / "observations.json").read_text())
    assert len(observed["running"]) > 10
    page = (tmp_path / "report.html").read_text()
    for title in ("At a glance", "Latency against load", "Throughput", "side by side", "Over time: auto"):
        assert title in page
    assert page.count("data:image/png;base64,") == len(list(tmp_path.glob("*.png"))) == 5
    assert (tmp_path / "overview.md").read_text() in done.stdout
    assert f"[{len(rows)}/{len(rows)}] auto timeline" in done.stderr


def test_a_broken_gate_fails_it_and_texts_are_those_of_requests_alone(server: Host, tmp_path: Path) -> None:
    done = loadtest(
        *(server, tmp_path, "--rates", "8", "--seconds", "2", "--settings", "lossless", "ar"),
        *("--timeline", "none", "--verify", "3", "--gate", "errors<=0,e2e_p50<=0.001"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line for line in done.stderr.splitlines() if line.startswith("GATE BROKEN")]
    assert [line.split(" is ")[0] for line in broken] == [
        f"GATE BROKEN: {setting} at 8/s: e2e_p50" for setting in ("lossless", "ar")
    ]
    records = list(read_records(tmp_path / "records.jsonl"))
    assert len(records) > 10
    assert {r.error for r in records} == {None}
