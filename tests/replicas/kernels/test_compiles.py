"""Every kernel compiles as it is launched, within its budget, and no step waits, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.offline.compiled import disorder
from benchmarks.gpu.offline.table import MARKS, table
from replicas.kernels.attention import TILE_SHAPES

ROOT = Path(__file__).parents[3]
BUDGET = ROOT / "benchmarks" / "gpu" / "offline" / "budget.json"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        cwd=ROOT,
    )


def test_kernels_keep_their_budget_on_hopper() -> None:
    """The 8B's, as its steps launch them, drawn at a temperature and begun ahead too; all GPUs: make
    check-gpu."""
    found = run("benchmarks.gpu.offline", "--targets", "sm_90", "--models", "8B", "--dtypes", "bf16")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("mode", ["ar", "self_speculation", "mixed"])
def test_nothing_is_compiled_or_captured_while_serving(mode: str) -> None:
    """And nearly all steps are begun ahead, whatever prompts and arrivals are beside them."""
    found = run(
        *("benchmarks.gpu.offline.load", "--modes", mode, "--concurrency", "1", "16", "64"),
        *("--page-sizes", "16", "--steps", "100", "--temperature", "0.7"),
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 3
    for counted in map(json.loads, lines):
        assert counted["graphs"] <= 40
        assert counted["kernels"] <= 80
        assert (counted["late_graphs"], counted["late_kernels"]) == (0, [])
        assert counted["eager"] == 0
        assert counted["ahead"] >= 0.95
        assert counted["unused"] <= 0.15


def test_nothing_spills_on_the_gpus_it_is_for() -> None:
    budget = json.loads(BUDGET.read_text())
    assert set(budget) == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    for target in ("sm_90", "sm_100"):
        for label, most in budget[target].items():
            assert "fp32" in label or most["spilled_bytes"] == 0, (target, label)


STEP = ("project_qkv", "attend", "project", "project_gated", "scan", "merge", "draw")
"""The kernels of an `ar` step but its last norm."""


def test_a_steps_kernels_begin_before_their_turn_where_they_can() -> None:
    for target, kernels in json.loads(BUDGET.read_text()).items():
        dependent = {label.split()[0] for label, most in kernels.items() if most["is_dependent"]}
        if target in ("sm_80", "gfx942"):
            assert not dependent
        else:
            assert dependent >= set(STEP)
            assert {label for label in kernels if label.split()[0] in STEP} == {
                label for label, most in kernels.items() if most["is_dependent"] and label.split()[0] in STEP
            }


KERNEL = """.visible .entry _scan(
	.param .u64 .ptr .global .align 16 _scan_param_0
)
{
	ld.param.b64 	%%rd1, [_scan_param_0];
	prefetch.global.L2 [%%rd1];
	%s
	griddepcontrol.wait; // dummy %%r0
	ld.global.b32 	%%r1, [%%rd1];
	ret;
}"""


def test_a_kernel_that_waits_first_is_in_order() -> None:
    assert not disorder(KERNEL % "mov.u32 	%r1, %tid.x;", is_dependent=True)
    assert not disorder("ret;", is_dependent=False)


@pytest.mark.parametrize(
    "early",
    [
        "ld.global.b32 	%r1, [%rd1];",
        "@%p1 st.global.b32 	[%rd1], %r1;",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;",
        "atom.global.add.u32 	%r1, [%rd1], 1;",
        "@%p1 bra 	$L__BB0_1;",
        "@%p1 ret;",
        "griddepcontrol.wait;",
    ],
)
def test_a_kernel_that_does_anything_before_it_waits_is_found_out(early: str) -> None:
    assert disorder(KERNEL % early, is_dependent=True)


def test_a_dependent_that_never_waits_is_found_out() -> None:
    assert disorder("ret;", is_dependent=True)
    assert disorder(KERNEL % "", is_dependent=False)


@pytest.mark.parametrize("rows", [64, 128])
def test_hopper_and_blackwell_multiply_by_their_own_instructions(rows: int) -> None:
    budget = json.loads(BUDGET.read_text())
    assert budget["sm_90"][f"attend {rows} bf16"]["tensor_cores"] == "wgmma"
    assert budget["sm_100"][f"attend {rows} bf16"]["tensor_cores"] == "tcgen05"


def test_splits_reckon_with_the_residency_as_compiled() -> None:
    budget = json.loads(BUDGET.read_text())["sm_90"]
    for shape in TILE_SHAPES:
        assert budget[f"attend {shape.block_m} bf16"]["num_resident"] == shape.num_resident


def test_a_layer_of_few_rows_is_of_five_launches_and_the_adapters() -> None:
    steps = ("ar 1", "ar 64 sampled", "verify 1x32", "draft 1x32")
    found = run("benchmarks.gpu.offline.launches", "--steps", *steps)
    assert found.returncode == 0, found.stderr
    counted = [json.loads(line) for line in found.stdout.splitlines()]
    assert [each["layer"] for each in counted] == [5, 5, 5, 7]


def test_several_processes_add_their_sums_and_launch_nothing_else() -> None:
    found = run("benchmarks.gpu.offline.launches", "--steps", "ar 1", "draft 1x32", "--processes", "2")
    assert found.returncode == 0, found.stderr
    counted = [json.loads(line) for line in found.stdout.splitlines()]
    assert [each["layer"] for each in counted] == [7, 9]
    assert all(each["of"]["c10d::allreduce_"] == 2 for each in counted)


def test_the_documents_table_is_the_budget() -> None:
    made = table(json.loads(BUDGET.read_text()))
    assert f"{MARKS[0]}\n{made}\n{MARKS[1]}" in (ROOT / "docs" / "gpu.md").read_text()
