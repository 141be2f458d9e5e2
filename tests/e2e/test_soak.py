"""The soak, cut to some seconds, with each of its faults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import ROOT


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_after_load_and_faults_all_is_as_before(tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.35", "--json", str(file)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(file.read_text())
    assert found["requests"]["complete"] > 50
    kinds = {"burst", "policy switched", "Redis killed", "Redis paused", "replica killed"}
    assert set(found["faults"]) == kinds
