"""The GPU benchmark at tiny sizes in the interpreter, and what is computed from its rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.crossover import accepted, chance_of, crossovers, rates
from benchmarks.gpu_targets import targets
from benchmarks.gpu_timing import Report

ROOT = Path(__file__).parents[2]
FIGURES = json.loads((ROOT / "benchmarks" / "data" / "acceptance.json").read_text())


def test_smoke(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--json", str(path), "--budget-s", "280"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert found.returncode == 0, found.stderr
    report = json.loads(path.read_text())
    assert report["failures"] == report["cut"] == []
    assert {row["kernel"] for row in report["kernels"]} == {
        "ragged_paged_attention", "confidence", "verify", "rms_norm", "swiglu", "store_kv", "adapter",
    }  # fmt: skip
    assert {(row["block"], row["draft_ms"] is None) for row in report["sweep"]} == {(1, True), (4, False)}
    assert {row["mode"] for row in report["overhead"]} == {"ar", "self_speculation"}
    assert (
        path.with_suffix(".csv").read_text().startswith("model,block,concurrency,query_tokens,mean_history,")
    )


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", str(tmp_path / "gpu.json")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert found.returncode == 1
    assert "no CUDA device; --smoke" in found.stderr


def row(concurrency: int, block: int, draft_ms: float | None, verify_ms: float) -> dict[str, object]:
    times = {"draft_ms": draft_ms, "verify_ms": verify_ms}
    return {"model": "8B", "concurrency": concurrency, "block": block, **times}


@pytest.mark.parametrize("tokens", [1.5, 4.65, 10.06])
def test_chance_of_acceptance_gives_the_length_back(tokens: float) -> None:
    assert accepted(chance_of(tokens), 32) == pytest.approx(tokens)
    assert accepted(chance_of(tokens), 8) < tokens


def test_rates_count_draft_and_verify() -> None:
    made = rates([row(4, 1, None, 10.0), row(4, 32, 12.0, 13.0)], chance_of(5.0), 2.5)
    assert made == pytest.approx(
        {"ar": 400.0, "self_speculation 32": 4 * 5 / 25e-3, "diffusion 32": 4 * 2.5 / 12e-3}
    )


def test_the_best_way_turns_with_the_load() -> None:
    few, many = [row(1, 1, None, 4.0), row(1, 32, 5.0, 5.0)], [row(64, 1, None, 6.0), row(64, 32, 60.0, 60.0)]
    first, last = crossovers(few + many, FIGURES)
    assert str(first["average, lossless"]).startswith("self_speculation 32 x2.7")
    assert last["average"] == "ar x1.00"


def test_targets_name_what_was_not_measured() -> None:
    report = Report({}, ceilings={"copy_gb_s": 4000.0, "bf16_tflop_s": 700.0})
    assert {found["met"] for found in targets(report)} == {None}
    report.sweep = [row(1, 1, None, 4.4), row(1, 32, 5.0, 9.0)]
    met = {
        str(found["wanted"]): found["met"] for found in targets(report) if str(found["target"])[:2] == "8B"
    }
    assert met == {"<= 1.2": True, "<= 1.35": False}
