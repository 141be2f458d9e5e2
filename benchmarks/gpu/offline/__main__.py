"""Compiles every kernel as it is launched, for GPUs that are not here: `python -m benchmarks.gpu.offline`.

The steps of the 8B (or 14B) architecture run on meta tensors (benchmarks.gpu.offline.trace). What each kernel
takes of each GPU is held against budget.json, and no step may wait for the device before its tokens are asked
for. Exit status 1 where a kernel does not compile, can't be launched or takes more than its budget, or where
a step waits. `--table PATH` writes the budget as a table into docs/gpu.md; `--write-budget` takes what is
found as the budget.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported

import triton

from benchmarks.gpu.model import Work
from benchmarks.gpu.offline.compiled import Compiled, budget_of, compile_variant, excess, one_of_each
from benchmarks.gpu.offline.devices import DEVICES
from benchmarks.gpu.offline.table import table, write_table
from benchmarks.gpu.offline.trace import Trace, trace_steps

BUDGET = Path(__file__).with_name("budget.json")
DTYPES = {
    "bf16": (torch.bfloat16, None, None),
    "fp8": (torch.bfloat16, torch.float8_e4m3fn, None),
    "fp8-weights": (torch.bfloat16, None, "fp8"),
    "int8-weights": (torch.bfloat16, None, "int8"),
    "fp32": (torch.float32, None, None),
}
"""dtype, kv_dtype and the codes that weights are by the names of the command line."""
_NUM_LAYERS = 2  # the first adds no residual; all others are alike
Found = dict[str, list[Compiled]]


def compile_for(name: str, models: list[str], dtypes: list[str]) -> tuple[list[Compiled], list[str]]:
    """Everything that the models launch on a device, compiled; and where their steps wait."""
    device = DEVICES[name]
    trace = Trace()
    for dtype in dtypes:
        weights, kv, codes = DTYPES[dtype]
        if dtype.startswith("fp8") and not device.has_fp8:
            continue
        for model in models:
            work = Work(
                model,
                dtype=weights,
                kv_dtype=kv,
                codes=codes,
                num_layers=_NUM_LAYERS,
            )
            trace_steps(device, trace, work)
    variants = one_of_each(list(trace.variants.values()))
    return [compile_variant(variant, device) for variant in variants], sorted(set(trace.waits))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--models", nargs="+", choices=("8B", "14B"), default=["8B"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--write-budget", action="store_true", help="take what is found as the budget")
    parser.add_argument("--table", type=Path, help="the document to write the budget's table into")
    options = parser.parse_args()
    began_s = time.monotonic()
    budget: dict[str, Any] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    found: Found = {}
    wrong: list[str] = []
    for name, items, waits in _compile_all(options.targets, options.models, options.dtypes):
        found[name] = items
        wrong += [f"a step waits for the device: {wait}" for wait in waits]
        if options.write_budget:
            budget[name] = budget_of(items)
            BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
    print(table({name: budget_of(items) for name, items in found.items()}))
    wrong = list(dict.fromkeys(wrong))
    for name, items in found.items():
        for item in items:
            wrong += excess(item, DEVICES[name], budget.get(name, {}).get(item.label))
    if options.table:
        write_table(options.table, budget)
    for line in wrong:
        print(line, file=sys.stderr)
    num_compiled = sum(map(len, found.values()))
    print(
        f"Triton {triton.__version__}: {num_compiled} compiled in {time.monotonic() - began_s:.0f} s; "
        f"{len(wrong)} wrong"
    )
    sys.exit(bool(wrong))


def _compile_all(
    targets: list[str], models: list[str], dtypes: list[str]
) -> Iterator[tuple[str, list[Compiled], list[str]]]:
    triton.knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as empty:  # Triton's cache has no log of the assembler
        triton.knobs.cache.dir = empty
        for name in targets:
            yield name, *compile_for(name, models, dtypes)


if __name__ == "__main__":
    main()
