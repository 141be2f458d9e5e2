"""The GPU benchmark at tiny sizes in the interpreter, and what is computed from its rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.crossover import accepted, chance_of, crossovers, rates
from benchmarks.gpu.costs import step_cost_table
from benchmarks.gpu.targets import targets
from benchmarks.gpu.timing import Report
from loadtest.simulator.cost import StepTable

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
        "ragged_paged_attention", "confidence", "sample_rows", "rms_norm", "swiglu", "store_kv", "adapter",
        "project_qkv", "project_gated", "project",
    }  # fmt: skip
    assert {(row["block"], row["draft_ms"] is None) for row in report["sweep"]} == {(1, True), (4, False)}
    assert {row["mode"] for row in report["overhead"]} == {"ar", "self_speculation"}
    header, *rows = path.with_suffix(".csv").read_text().splitlines()
    assert header == "model,block,concurrency,query_tokens,mean_history,draft_ms,verify_ms,std_ms"
    assert [line.rsplit(",", 3)[0] for line in rows] == ["tiny,1,1,1,5", "tiny,4,1,4,5"]
    assert StepTable.load(tmp_path / "gpu-step-cost-tiny.json").ms(1, 1, 5) > 0
    assert report["crossovers"][0]["model"] == "tiny"


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


def test_rates_are_of_one_forward_a_round() -> None:
    """A chance of 0.5 at block 2: of three rounds two have a draft, of 4 rows and 1.5 tokens, one has 3 rows
    and a token."""
    sweep = [row(4, 1, None, 10.0), row(4, 2, 11.0, 13.0), row(4, 4, 18.0, 20.0)]
    made = rates(sweep, 0.5, 2.5)
    took_ms = 12.0 + (11 / 3 - 2) / 2 * 7.0
    assert made == pytest.approx({"ar": 400.0, "self_speculation 2": 4 * (4 / 3) / took_ms * 1e3}, rel=1e-3)


def test_the_best_way_turns_with_the_load() -> None:
    few = [row(1, 1, None, 4.0), row(1, 32, 5.0, 5.0), row(1, 64, 5.0, 5.0)]
    many = [row(64, 1, None, 6.0), row(64, 32, 60.0, 60.0), row(64, 64, 120.0, 120.0)]
    first, last = crossovers(few + many, FIGURES)
    assert str(first["average, lossless"]).startswith("self_speculation 32 x3.1")
    assert last["average"] == "ar x1.00"


def test_the_simulator_reads_the_sweep() -> None:
    about = {"device": "a GPU", "dtype": "bfloat16", "weights": "random"}
    times = ((1, 1, None, 4.0), (1, 32, 6.0, 5.0), (64, 1, None, 9.0))
    sweep = [row(c, b, *ms) | {"query_tokens": c * b, "mean_history": 800} for c, b, *ms in times]
    other = row(1, 1, None, 70.0) | {"model": "14B", "query_tokens": 1, "mean_history": 800}
    overhead = [
        {"mode": "ar", "concurrency": 1, "overhead_ms": 0.5},
        {"mode": "ar", "concurrency": 64, "overhead_ms": 2.39},
        {"mode": "self_speculation", "concurrency": 64, "overhead_ms": 50.0},
    ]
    table = step_cost_table("8B", about, [*sweep, other], overhead)
    assert table["overhead_ms"] == {"step": 0.47, "sequence": 0.03}
    read = StepTable.parse(table, "table")
    assert read.ms(1, 1, 800) == pytest.approx(4.5)
    assert read.ms(1, 32, 800) == pytest.approx(6.0)  # the mean of draft and verify
    assert read.ms(64, 64, 64 * 800) == pytest.approx(9.0 + 2.39)


def test_targets_name_what_was_not_measured() -> None:
    report = Report({}, ceilings={"copy_gb_s": 4000.0, "bf16_tflop_s": 700.0})
    assert {found["met"] for found in targets(report)} == {None}
    report.sweep = [row(1, 1, None, 4.4), row(1, 32, 5.0, 9.0)]
    met = {
        str(found["wanted"]): found["met"] for found in targets(report) if str(found["target"])[:2] == "8B"
    }
    assert met == {"<= 1.2": True, "<= 1.35": False}
