"""Targets of the project on a GPU, against what was measured. Pure."""

from collections.abc import Callable, Iterator
from functools import partial
from operator import ge
from typing import Any

from benchmarks.gpu.timing import Report

_MATRIX_PARAMETERS = {
    "8B": 34 * (4096 * 48 * 128 + 4096 * 4096 + 3 * 4096 * 14336) + 131072 * 4096,
    "14B": 40 * (5120 * 48 * 128 + 4096 * 5120 + 3 * 5120 * 16384) + 131072 * 5120,
}
"""Parameters of the matrices that a forward reads: all but the embedding."""


def targets(report: Report) -> list[dict[str, object]]:
    """The targets, each with what was found, None where that was not measured, and whether it is met."""
    return [
        {"target": name, "wanted": wanted, "found": found, "met": None if found is None else met(found)}
        for name, wanted, found, met in _all(report)
    ]


def _all(report: Report) -> Iterator[tuple[str, str, Any, Callable[[Any], bool]]]:
    for row in report.kernels:
        shape = str(row["shape"])
        if row["kernel"] == "ragged_paged_attention" and shape.startswith("1 query"):
            yield f"attention, {shape}", "of_copy >= 0.85", row["of_copy"], lambda x: x >= 0.85
        if shape.startswith("block") and row.get("against") == "SDPA, dense":
            yield f"attention, {shape}", "speedup over SDPA >= 1", row["speedup"], lambda x: x >= 1
        if row["kernel"] == "confidence":
            yield f"confidence, {shape}", "of_copy >= 0.85", row["of_copy"], lambda x: x >= 0.85
    by_step = {(row["model"], row["concurrency"], row["block"]): row for row in report.sweep}
    for model, parameters in _MATRIX_PARAMETERS.items():
        for block, bound in ((1, 1.2), (32, 1.35)):
            step = by_step.get((model, 1, block))
            ratio = None
            if step is not None:
                read_ms = 2 * parameters / report.ceilings["copy_gb_s"] / 1e6
                ratio = round(float(str(step["verify_ms"])) / read_ms, 3)
            name = f"{model}, concurrency 1, {block} queries: forward over one read of the weights"
            yield name, f"<= {bound}", ratio, partial(ge, bound)
    for row in report.overhead:
        max_ms = 1.0 if row["concurrency"] == 1 else 3.0
        name = f"{row['model']} {row['mode']}, concurrency {row['concurrency']}: engine overhead a round, ms"
        yield name, f"<= {max_ms}", row["overhead_ms"], partial(ge, max_ms)
